"""What the interceptor does around a call, through the wire, for every shape of call."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping, Sequence
from typing import Any

import grpc
import pytest
import structlog
from structlog.contextvars import get_contextvars
from structlog.testing import capture_logs
from tests.integration.rpc.probe import Probe, details, served, stub

from penstock.api.registry.v1 import artifact_service_pb2 as pb
from penstock.api.registry.v1 import artifact_service_pb2_grpc as rpc
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.rpc import errors
from penstock.rpc.server import Service

SERVICE = "/penstock.api.registry.v1.ArtifactService"
QUERY = pb.QueryWriteStatusRequest(digest="d")
FINE = pb.QueryWriteStatusResponse(committed_size_bytes=1)
CHUNK = pb.WriteRequest(chunk=b"c")
DATA = pb.ReadResponse(data=b"d")
Call = Callable[..., Awaitable[Any]]
REFUSED = errors.WrongOffsetError("It stands at byte 7.", committed_size_bytes="7")


async def _logged(logs: Sequence[MutableMapping[str, Any]], count: int = 1) -> None:
    """Waits for the lines of calls in the log, which may come behind their answers."""
    async with asyncio.timeout(5):
        while sum(entry["event"] == "call" for entry in logs) < count:  # noqa: ASYNC110  # a log has no event
            await asyncio.sleep(0.01)


async def refuse(_: object) -> object:
    raise REFUSED


async def refuse_at_once(_: object) -> AsyncIterator[Any]:
    raise REFUSED
    yield


async def refuse_later(_: object) -> AsyncIterator[Any]:
    yield DATA
    raise REFUSED


async def refuse_after_reading(requests: AsyncIterator[Any]) -> object:
    async for _ in requests:
        raise REFUSED


async def call_query(channel: grpc.aio.Channel, **options: object) -> object:
    return await stub(channel).QueryWriteStatus(QUERY, **options)


async def call_read(channel: grpc.aio.Channel, **options: object) -> list[Any]:
    return [response async for response in stub(channel).Read(pb.ReadRequest(), **options)]


async def call_write(channel: grpc.aio.Channel, **options: object) -> object:
    return await stub(channel).Write(iter([CHUNK, CHUNK]), **options)


SHAPES = pytest.mark.parametrize(
    ("probe", "call"),
    [
        pytest.param(Probe(query=refuse), call_query, id="unary"),
        pytest.param(Probe(read=refuse_at_once), call_read, id="stream-out"),
        pytest.param(Probe(read=refuse_later), call_read, id="stream-out-begun"),
        pytest.param(Probe(write=refuse), call_write, id="stream-in"),
        pytest.param(Probe(write=refuse_after_reading), call_write, id="stream-in-begun"),
    ],
)


@SHAPES
async def test_a_domain_error_reaches_the_caller_whole(probe: Probe, call: Call) -> None:
    async with served(probe.service()) as channel:
        with capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, metadata=[("x-request-id", "mine-1")])
    assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
    assert caught.value.details() == "It stands at byte 7."
    info, _ = details(caught.value)
    assert (info.domain, info.reason) == ("penstock", "WRONG_OFFSET")
    assert dict(info.metadata) == {"committed_size_bytes": "7", "request_id": "mine-1"}
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "mine-1"
    (entry,) = [entry for entry in logs if entry["event"] == "call"]
    assert entry["status"] == "OUT_OF_RANGE"
    assert entry["message"] == "It stands at byte 7."


async def test_messages_sent_before_an_error_arrive() -> None:
    async with served(Probe(read=refuse_later).service()) as channel:
        call = stub(channel).Read(pb.ReadRequest())
        assert await call.read() == DATA
        with pytest.raises(grpc.aio.AioRpcError):
            await call.read()


async def test_every_wrong_field_is_named_by_its_path() -> None:
    async def query(_: object) -> object:
        raise errors.InvalidFieldError(
            [errors.Violation("spec.layers[2].units", "expected 1 to 9"), errors.Violation("name", "expected text")]
        )

    async with served(Probe(query=query).service()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_query(channel)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    _, bad = details(caught.value)
    assert [(v.field, v.description) for v in bad.field_violations] == [
        ("spec.layers[2].units", "expected 1 to 9"),
        ("name", "expected text"),
    ]


async def test_an_error_too_long_for_metadata_still_arrives() -> None:
    async def query(_: object) -> object:
        raise errors.InvalidFieldError([errors.Violation(f"rows[{i}]", "é" * 300) for i in range(2000)])

    async with served(Probe(query=query).service()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_query(channel)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    info, bad = details(caught.value)
    assert info.reason == "INVALID_FIELD"
    assert bad.field_violations[0].field == "rows[0]"


async def test_an_unknown_exception_tells_a_stranger_only_the_request_id() -> None:
    async def query(_: object) -> object:
        raise RuntimeError("/secret/path password=hunter2")

    async with served(Probe(query=query).service()) as channel:
        with capture_logs() as logs, pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_query(channel, metadata=[("x-request-id", "mine-2")])
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert caught.value.details() == "Internal error in request mine-2."
    info, _ = details(caught.value)
    assert info.reason == "INTERNAL"
    assert dict(info.metadata) == {"request_id": "mine-2"}
    assert "hunter2" not in str(caught.value.trailing_metadata())
    (entry,) = [entry for entry in logs if entry["event"] == "unexpected error"]
    assert "hunter2" in str(entry["exc_info"])


@pytest.mark.parametrize("sent", [[], [("x-request-id", "a b")], [("x-request-id", "x" * 65)], [("x-request-id", "")]])
async def test_a_missing_or_bad_request_id_is_replaced(sent: list[tuple[str, str]]) -> None:
    async def query(_: object) -> object:
        return FINE

    async with served(Probe(query=query).service()) as channel:
        call = stub(channel).QueryWriteStatus(QUERY, metadata=sent)
        await call
        trailers = dict(await call.trailing_metadata())
    assert len(trailers["x-request-id"]) == 32
    assert int(trailers["x-request-id"], 16)


@pytest.mark.parametrize("method", ["QueryWriteStatus", "Read", "Write"])
async def test_bytes_that_are_no_message_are_the_callers_fault(method: str) -> None:
    async def drained(requests: AsyncIterator[Any]) -> object:
        async for _ in requests:
            pass

    async with served(Probe(write=drained).service()) as channel:
        kinds = {"QueryWriteStatus": channel.unary_unary, "Read": channel.unary_stream, "Write": channel.stream_unary}
        garbage = b"\xff\xff\xff"
        call = kinds[method](f"{SERVICE}/{method}")(iter([garbage]) if method == "Write" else garbage)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await (call.read() if method == "Read" else call)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert details(caught.value)[0].reason == "INVALID_FIELD"


async def test_an_unknown_method_is_unimplemented() -> None:
    async with served(Probe().service()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(f"{SERVICE}/Delete")(b"")
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_unary_timeout_bounds_a_call_without_deadline() -> None:
    ended = asyncio.Event()

    async def query(_: object) -> object:
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    async with served(Probe(query=query).service(), unary_timeout_s=0.05) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_query(channel)
        assert ended.is_set()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details(caught.value)[0].reason == "DEADLINE_EXCEEDED"


async def test_a_handlers_own_timeout_is_no_deadline() -> None:
    async def query(_: object) -> object:
        raise TimeoutError("of something inside")

    async with served(Probe(query=query).service()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_query(channel)
    assert caught.value.code() is grpc.StatusCode.INTERNAL


async def test_streams_may_take_longer_than_unary_timeout() -> None:
    async def write(requests: AsyncIterator[Any]) -> object:
        count = 0
        async for _ in requests:
            count += 1
            await asyncio.sleep(0.1)  # the passing of time is what is tested
        return pb.WriteResponse(blob={"size_bytes": count})

    async def read(_: object) -> AsyncIterator[Any]:
        yield DATA
        await asyncio.sleep(0.1)
        yield DATA

    async with served(Probe(write=write, read=read).service(), unary_timeout_s=0.05) as channel:
        assert (await call_write(channel)).blob.size_bytes == 2
        assert len(await call_read(channel)) == 2


async def wait_in_query(seen: asyncio.Event, ended: asyncio.Event) -> object:
    seen.set()
    try:
        await asyncio.Event().wait()
    finally:
        ended.set()


def waiting_probe(seen: asyncio.Event, ended: asyncio.Event) -> Probe:
    """Every method waits for ever, and says when it began and ended."""

    async def read(_: object) -> AsyncIterator[Any]:
        yield DATA
        await wait_in_query(seen, ended)

    return Probe(query=lambda _: wait_in_query(seen, ended), read=read, write=lambda _: wait_in_query(seen, ended))


@pytest.mark.parametrize("call", [call_query, call_read, call_write])
async def test_the_callers_deadline_cancels_the_handler(call: Call) -> None:
    seen, ended = asyncio.Event(), asyncio.Event()
    async with served(waiting_probe(seen, ended).service()) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call(channel, timeout=0.2)
        async with asyncio.timeout(5):
            await ended.wait()
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


@pytest.mark.parametrize("method", ["QueryWriteStatus", "Read", "Write"])
async def test_a_caller_that_leaves_cancels_the_handler(method: str) -> None:
    seen, ended = asyncio.Event(), asyncio.Event()
    async with served(waiting_probe(seen, ended).service()) as channel:
        request = {"QueryWriteStatus": QUERY, "Read": pb.ReadRequest(), "Write": iter([CHUNK])}[method]
        with capture_logs() as logs:
            call = getattr(stub(channel), method)(request)
            if method == "Read":
                await call.read()
            async with asyncio.timeout(5):
                await seen.wait()
                call.cancel()
                await ended.wait()
            await _logged(logs)
    assert [entry["status"] for entry in logs if entry["event"] == "call"] == ["CANCELLED"]


async def test_a_stream_left_between_two_messages_is_closed() -> None:
    ended = asyncio.Event()

    async def read(_: object) -> AsyncIterator[Any]:
        try:
            while True:
                yield pb.ReadResponse(data=bytes(1 << 20))
        finally:
            ended.set()

    async with served(Probe(read=read).service()) as channel:
        call = stub(channel).Read(pb.ReadRequest())
        await call.read()
        call.cancel()
        async with asyncio.timeout(5):
            await ended.wait()


async def test_concurrent_calls_keep_their_own_log_context() -> None:
    all_in = asyncio.Barrier(8)

    async def query(request: pb.QueryWriteStatusRequest) -> object:
        bound = get_contextvars()
        assert bound["request_id"] == request.digest
        await all_in.wait()
        assert get_contextvars() == bound == {"service": "probe", "request_id": request.digest}
        return FINE

    structlog.contextvars.bind_contextvars(service="probe")
    try:
        async with served(Probe(query=query).service()) as channel:
            for _ in range(2):
                await asyncio.gather(
                    *(
                        stub(channel).QueryWriteStatus(
                            pb.QueryWriteStatusRequest(digest=f"call-{i}"), metadata=[("x-request-id", f"call-{i}")]
                        )
                        for i in range(8)
                    )
                )
        assert get_contextvars() == {"service": "probe"}
    finally:
        structlog.contextvars.clear_contextvars()


async def test_a_servicer_that_aborts_by_itself_keeps_its_status() -> None:
    class Aborting(rpc.ArtifactServiceServicer):
        async def QueryWriteStatus(self, request: object, context: grpc.aio.ServicerContext) -> object:
            await context.abort(grpc.StatusCode.DATA_LOSS, "gone")

    service = Service(pb.DESCRIPTOR, lambda server: rpc.add_ArtifactServiceServicer_to_server(Aborting(), server))
    async with served(service) as channel:
        with capture_logs() as logs:
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await call_query(channel, metadata=[("x-request-id", "mine-3")])
            await _logged(logs)
    assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.DATA_LOSS, "gone")
    assert dict(caught.value.trailing_metadata())["x-request-id"] == "mine-3"
    assert [entry["status"] for entry in logs if entry["event"] == "call"] == ["DATA_LOSS"]


async def test_a_message_above_the_limit_is_refused_both_ways() -> None:
    async def read(_: object) -> AsyncIterator[Any]:
        yield pb.ReadResponse(data=bytes(2 << 20))

    async def write(_: object) -> pb.WriteResponse:
        return pb.WriteResponse(blob=Blob(digest="x" * (2 << 20)))

    async with served(Probe(read=read, write=write).service(), max_message_mib=1) as channel:
        big = stub(channel).QueryWriteStatus(pb.QueryWriteStatusRequest(digest="x" * (2 << 20)))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await big
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        with capture_logs() as logs:
            for answer in (call_read(channel), stub(channel).Write(iter(()))):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await answer
                assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
                assert "max_message_mib" in str(caught.value.details())
            await _logged(logs, 2)
        assert [entry["status"] for entry in logs if entry["event"] == "call"] == ["RESOURCE_EXHAUSTED"] * 2


async def test_one_call_too_many_is_refused() -> None:
    release = asyncio.Event()
    entered = asyncio.Event()

    async def query(_: object) -> object:
        entered.set()
        await release.wait()
        return FINE

    async with served(Probe(query=query).service(), max_concurrent_calls=1) as channel:
        first = asyncio.create_task(call_query(channel))
        await entered.wait()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call_query(channel)
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        release.set()
        assert await first == FINE
        assert await call_query(channel) == FINE
