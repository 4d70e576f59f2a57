"""Every shape of call and every error, the same on every transport."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc
import pytest
import pytest_asyncio
from google.protobuf.wrappers_pb2 import BytesValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.integration.rpc.conformance import TRANSPORTS, Server, Wire, ask, eventually_idle, method, serving, state
from tests.integration.rpc.conformance_app import ERRORS, NAME
from tests.integration.rpc.probe import details

from penstock.rpc.errors import InvalidFieldError
from penstock.rpc.status import CODES

# One server of each transport for the whole module: a loop that outlives a test keeps its process.
pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.fixture(scope="module", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(transport: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Server]:
    async with serving(
        tmp_path_factory.mktemp(transport), transport=transport, max_message_mib=65, unary_timeout_s=2
    ) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    async with server.channel() as connected:
        yield connected


async def stream(*values: bytes) -> AsyncIterator[BytesValue]:
    for value in values:
        yield BytesValue(value=value)


async def failed(call: Any) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await (all_of(call) if hasattr(call, "__aiter__") else call)
    return caught.value


async def all_of(call: Any) -> list[BytesValue]:
    return [answer async for answer in call]


@pytest.mark.parametrize("size", [0, 1, 5, 70_000, 5_000_000])
async def test_every_shape(channel: grpc.aio.Channel, size: int) -> None:
    value = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    assert await ask(channel, value) == value
    assert await ask(channel, value, "Quick") == value
    answers = [answer async for answer in method(channel, "Down")(BytesValue(value=b"3,%d," % size))]
    assert [len(answer.value) for answer in answers] == [size] * 3
    assert (await method(channel, "Up")(stream(value, b"", value))).value == b"%d" % (2 * size)
    assert [answer.value async for answer in method(channel, "Both")(stream(value, b"", value))] == [value, b"", value]


async def test_streams_of_nothing(channel: grpc.aio.Channel) -> None:
    assert [answer async for answer in method(channel, "Down")(BytesValue(value=b"0,0,"))] == []
    assert (await method(channel, "Up")(stream())).value == b"0"
    assert [answer async for answer in method(channel, "Both")(stream())] == []


async def test_a_conversation_goes_to_and_fro(channel: grpc.aio.Channel) -> None:
    call = method(channel, "Both")()
    for number in range(100):
        await call.write(BytesValue(value=b"%d" % number))
        assert (await call.read()).value == b"%d" % number
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF


def calls_that_fail(channel: grpc.aio.Channel, name: str) -> Iterator[Any]:
    """The error raised by each shape, with and without a message sent before it."""
    asked = b"error:" + name.encode()
    yield method(channel, "Unary")(BytesValue(value=asked), metadata=[("x-request-id", "mine")])
    yield method(channel, "Quick")(BytesValue(value=asked), metadata=[("x-request-id", "mine")])
    for count in (0, 2):
        value = f"{count},5,{name}".encode()
        yield method(channel, "Down")(BytesValue(value=value), metadata=[("x-request-id", "mine")])
    for values in ((asked,), (b"x", asked)):
        yield method(channel, "Up")(stream(*values), metadata=[("x-request-id", "mine")])
        yield method(channel, "Both")(stream(*values), metadata=[("x-request-id", "mine")])


@pytest.mark.parametrize("name", ERRORS)
async def test_every_error_of_the_domain_in_every_shape(channel: grpc.aio.Channel, name: str) -> None:
    error = ERRORS[name]
    for call in calls_that_fail(channel, name):
        caught = await failed(call)
        assert caught.code() is CODES[error.reason]
        assert caught.details() == error.message
        info, bad = details(caught)
        assert dict(info.metadata) == {**error.metadata, "request_id": "mine"}
        expected = error.violations if isinstance(error, InvalidFieldError) else ()
        assert [(found.field, found.description) for found in bad.field_violations] == [
            (violation.field, violation.description) for violation in expected
        ]
        assert dict(caught.trailing_metadata())["x-request-id"] == "mine"


async def test_a_handler_that_raises_tells_a_stranger_nothing(server: Server, channel: grpc.aio.Channel) -> None:
    caught = await failed(method(channel, "Unary")(BytesValue(value=b"raise"), metadata=[("x-request-id", "mine-7")]))
    assert (caught.code(), caught.details()) == (grpc.StatusCode.INTERNAL, "Internal error in request mine-7.")
    assert "hunter2" not in str(caught.trailing_metadata())
    log = server.log.read_text()
    assert "hunter2" in log
    assert [line for line in log.splitlines() if "about to raise" in line and '"request_id": "mine-7"' in line]


async def test_statuses_that_a_handler_chooses(channel: grpc.aio.Channel) -> None:
    caught = await failed(method(channel, "Unary")(BytesValue(value=b"abort")))
    assert (caught.code(), caught.details()) == (grpc.StatusCode.DATA_LOSS, "gone ü")
    assert dict(caught.trailing_metadata())["why"] == "because"
    caught = await failed(method(channel, "Unary")(BytesValue(value=b"code")))
    assert (caught.code(), caught.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "set")
    caught = await failed(method(channel, "Unary")(BytesValue(value=b"unimplemented")))
    assert caught.code() is grpc.StatusCode.UNIMPLEMENTED
    unknown = channel.unary_unary(f"/{NAME}/Nothing")(b"")
    assert (await failed(unknown)).code() is grpc.StatusCode.UNIMPLEMENTED
    garbage = channel.unary_unary(f"/{NAME}/Unary")(b"\xff\xff")
    assert (await failed(garbage)).code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_metadata_goes_both_ways(channel: grpc.aio.Channel) -> None:
    sent = [("plain", "a b,c"), ("twice", "1"), ("twice", "2"), ("some-bin", b"\0\x01\xff,=")]
    call = method(channel, "Unary")(BytesValue(value=b"metadata"), metadata=sent)
    received = eval((await call).value)  # written by repr
    assert [pair for pair in received if pair[0] in {"plain", "twice", "some-bin"}] == sent
    assert dict(await call.initial_metadata())["first"] == "1"
    assert dict(await call.initial_metadata())["first-bin"] == b"\0\xff"
    assert dict(await call.trailing_metadata())["last"] == "2"
    assert dict(await call.trailing_metadata())["last-bin"] == b"\xfe\0"


async def test_a_request_id_is_kept_or_made(channel: grpc.aio.Channel) -> None:
    for sent, kept in (("mine", True), ("not mine", False)):
        call = method(channel, "Unary")(BytesValue(), metadata=[("x-request-id", sent)])
        await call
        told = dict(await call.trailing_metadata())["x-request-id"]
        assert (told == sent) is kept
        assert kept or int(told, 16)


async def test_deadlines(channel: grpc.aio.Channel) -> None:
    assert 3 < float(await ask(channel, b"remaining", timeout=5)) < 5.1  # grpc rounds up
    assert await ask(channel, b"remaining") == b"None"
    before = (await state(channel))["cancelled"]
    caught = await failed(method(channel, "Unary")(BytesValue(value=b"sleep:30"), timeout=0.2))
    assert caught.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    caught = await failed(method(channel, "Down")(BytesValue(value=b"1,1,wait"), timeout=0.2))
    assert caught.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    caught = await failed(method(channel, "Up")(stream(b"wait"), timeout=0.2))
    assert caught.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert (await eventually_idle(channel))["cancelled"] == before + 3


async def test_the_servers_own_limit_on_unary_calls(channel: grpc.aio.Channel) -> None:
    for what in (b"sleep:30", b"stubborn:30"):
        caught = await failed(method(channel, "Unary")(BytesValue(value=what)))
        assert caught.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert details(caught)[0].reason == "DEADLINE_EXCEEDED"


async def test_callers_that_leave_cancel_their_handlers(channel: grpc.aio.Channel) -> None:
    before = (await state(channel))["cancelled"]
    calls = [
        method(channel, "Unary")(BytesValue(value=b"sleep:1.9")),
        method(channel, "Down")(BytesValue(value=b"1,1,wait")),
        method(channel, "Up")(stream(b"wait")),
        method(channel, "Both")(),
    ]
    async with asyncio.timeout(5):
        while (await state(channel))["in_progress"] < 4:  # noqa: ASYNC110  # another process
            await asyncio.sleep(0.01)
    for call in calls:
        call.cancel()
    # Who waits for messages may see the end of them instead.
    assert (await eventually_idle(channel, 4))["cancelled"] >= before + 3


async def test_compressed_requests(channel: grpc.aio.Channel) -> None:
    value = bytes(1_000_000)
    for algorithm in (grpc.Compression.Gzip, grpc.Compression.Deflate):
        assert await ask(channel, value, compression=algorithm) == value
        assert await ask(channel, value, "Quick", compression=algorithm) == value
        assert (await method(channel, "Up")(stream(value, value), compression=algorithm)).value == b"2000000"
    bomb = bytes(70 << 20)
    caught = await failed(method(channel, "Unary")(BytesValue(value=bomb), compression=grpc.Compression.Gzip))
    assert caught.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_64_mib_messages_both_ways_and_no_larger_ones(channel: grpc.aio.Channel) -> None:
    value = bytes(64 << 20)
    assert await ask(channel, value, "Quick") == value
    assert len(await ask(channel, b"big:%d" % len(value))) == len(value)
    caught = await failed(method(channel, "Unary")(BytesValue(value=bytes(66 << 20))))
    assert caught.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    caught = await failed(method(channel, "Unary")(BytesValue(value=b"big:%d" % (66 << 20))))
    assert caught.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "max_message_mib" in str(caught.details())


async def test_health(channel: grpc.aio.Channel) -> None:
    health = health_pb2_grpc.HealthStub(channel)
    for name in ("", NAME):
        answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    caught = await failed(health.Check(health_pb2.HealthCheckRequest(service="nobody")))
    assert caught.code() is grpc.StatusCode.NOT_FOUND
    watch = health.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


async def test_reflection(channel: grpc.aio.Channel) -> None:
    async def requests() -> AsyncIterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=NAME)

    stub = reflection_pb2_grpc.ServerReflectionStub(channel)
    listed, file = [answer async for answer in stub.ServerReflectionInfo(requests())]
    names = {service.name for service in listed.list_services_response.service}
    assert names == {NAME, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert file.file_descriptor_response.file_descriptor_proto


async def test_a_thousand_streams_at_once(channel: grpc.aio.Channel) -> None:
    calls = [method(channel, "Both")() for _ in range(1000)]
    for turn in (b"a", b"b"):
        await asyncio.gather(*(call.write(BytesValue(value=turn)) for call in calls))
        answers = await asyncio.gather(*(call.read() for call in calls))
        assert {answer.value for answer in answers} == {turn}
    assert (await state(channel))["in_progress"] == 1000
    await asyncio.gather(*(call.done_writing() for call in calls))
    assert {await call.code() for call in calls} == {grpc.StatusCode.OK}
    await eventually_idle(channel)


async def test_ten_thousand_streams_opened_and_cancelled(server: Server, channel: grpc.aio.Channel) -> None:
    async def opened_and_cancelled() -> None:
        call = method(channel, "Down")(BytesValue(value=b"1,1,wait"))
        await call.read()
        call.cancel()

    await asyncio.gather(*(opened_and_cancelled() for _ in range(500)))
    await eventually_idle(channel)
    before = server.resident_mib()
    for _ in range(19):
        await asyncio.gather(*(opened_and_cancelled() for _ in range(500)))
    await eventually_idle(channel)
    assert server.resident_mib() - before < 60
    assert await ask(channel, b"still there") == b"still there"


async def test_half_sent_requests(server: Server, channel: grpc.aio.Channel) -> None:
    with contextlib.ExitStack() as wires:
        for payload in (None, b"", b"\0", b"\0\0\0\0\x20half", b"\0\xff\xff\xff\xff"):
            for name in ("Unary", "Up", "Both"):
                wire = wires.enter_context(Wire(server.address))
                wire.call(1, f"/{NAME}/{name}")
                if payload is not None:
                    wire.data(1, payload)
    await eventually_idle(channel)
    # An end in the middle of a message is the caller's error.
    with Wire(server.address) as wire:
        wire.call(1, f"/{NAME}/Up")
        wire.data(1, b"\0\0\0\0\x20half", end=True)
        assert await asyncio.to_thread(wire.ending, 1)
    assert await ask(channel, b"still there") == b"still there"


async def test_who_is_no_grpc_client(server: Server, channel: grpc.aio.Channel) -> None:
    for fields in (
        {":method": "GET", ":path": "/"},
        {":method": "GET", ":path": f"/{NAME}/Unary", "content-type": "application/grpc"},
        {":method": "POST", ":path": f"/{NAME}/Unary", "content-type": "application/json"},
        {":method": "POST", ":path": f"/{NAME}/Unary", "content-type": "application/grpc-web"},
        {":method": "POST", ":path": "/no/such/path", "content-type": "application/grpc"},
    ):
        with Wire(server.address) as wire:
            wire.headers(1, {":scheme": "http", ":authority": "x", **fields}, end=True)
            assert await asyncio.to_thread(wire.ending, 1), fields
    assert await ask(channel, b"still there") == b"still there"


async def test_what_the_headers_ask_for_is_checked(server: Server, channel: grpc.aio.Channel) -> None:
    for more in ({"grpc_timeout": "soon"}, {"grpc_encoding": "snappy"}, {"x_request_id": "~"}, {"a_bin": "!"}):
        with Wire(server.address) as wire:
            wire.call(1, f"/{NAME}/Unary", **more)
            wire.data(1, b"\0\0\0\0\0", end=True)
            assert await asyncio.to_thread(wire.ending, 1), more
    assert await ask(channel, b"still there") == b"still there"


async def test_slow_readers_keep_memory_bounded(server: Server, channel: grpc.aio.Channel) -> None:
    before = server.resident_mib()
    calls = [method(channel, "Down")(BytesValue(value=b"1000,1000000,")) for _ in range(10)]
    for call in calls:
        await call.read()
    await asyncio.sleep(1)  # time for ten gigabytes, if nothing held them back
    assert server.resident_mib() - before < 100
    for call in calls:
        call.cancel()
    await eventually_idle(channel)


async def test_requests_that_nobody_reads_keep_memory_bounded(server: Server, channel: grpc.aio.Channel) -> None:
    async def pump(call: Any) -> None:
        await call.write(BytesValue(value=b"wait"))
        for _ in range(1000):
            await call.write(BytesValue(value=bytes(1_000_000)))

    before = server.resident_mib()
    calls = [method(channel, "Up")() for _ in range(10)]
    pumps = [asyncio.ensure_future(pump(call)) for call in calls]
    await asyncio.sleep(1)  # time for ten gigabytes, if nothing held them back
    assert server.resident_mib() - before < 100
    assert not any(pump.done() for pump in pumps)
    for call in calls:
        call.cancel()
    await asyncio.gather(*pumps, return_exceptions=True)
    await eventually_idle(channel)
