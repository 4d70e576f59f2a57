"""How a server starts, drains and ends, in process and as the process an operator runs."""

import asyncio
import json
import os
import signal
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.integration.rpc.probe import Probe, connected, details, served, serving, stub

from penstock.api.registry.v1 import artifact_service_pb2 as pb
from penstock.rpc.errors import NotReadyError, StartupError
from penstock.rpc.server import Service

ROOT = Path(__file__).parents[3]
SERVICE = "penstock.api.registry.v1.ArtifactService"
QUERY = pb.QueryWriteStatusRequest(digest="d")
FINE = pb.QueryWriteStatusResponse(committed_size_bytes=1)


async def fine(_: object) -> pb.QueryWriteStatusResponse:
    return FINE


@pytest.fixture
async def after() -> AsyncIterator[AsyncExitStack]:
    """Closes what has to outlive a server."""
    async with AsyncExitStack() as stack:
        yield stack


class Slow:
    """A unary method that waits until the test lets it go."""

    def __init__(self) -> None:
        self.entered = asyncio.Event()
        self.release = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def query(self, _: object) -> pb.QueryWriteStatusResponse:
        self.entered.set()
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return FINE

    def service(self) -> Service:
        return Probe(query=self.query).service()


async def ask(channel: grpc.aio.Channel) -> pb.QueryWriteStatusResponse:
    return await stub(channel).QueryWriteStatus(QUERY)


def now() -> float:
    return asyncio.get_running_loop().time()


async def test_a_call_in_progress_finishes_while_new_ones_are_refused(after: AsyncExitStack) -> None:
    slow = Slow()

    async def drain() -> None:
        # Whoever calls now is refused, and the call in progress goes on.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub(channel).QueryWriteStatus(QUERY, timeout=5)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert details(caught.value)[0].reason == "NOT_READY"
        health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
        assert health.status == health_pb2.HealthCheckResponse.NOT_SERVING
        slow.release.set()

    async with serving(slow.service(), drain=drain, drain_s=10) as address:
        channel = await after.enter_async_context(connected(address))
        call = asyncio.create_task(ask(channel))
        await slow.entered.wait()
        leaving = now()
    assert await call == FINE
    assert now() - leaving < 5


async def test_a_call_that_outlasts_the_drain_is_cut(after: AsyncExitStack) -> None:
    slow = Slow()
    async with serving(slow.service(), drain_s=0.1) as address:
        channel = await after.enter_async_context(connected(address))
        call = asyncio.create_task(ask(channel))
        await slow.entered.wait()
        leaving = now()
    assert now() - leaving < 5
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    async with asyncio.timeout(5):
        await slow.cancelled.wait()


async def test_draining_ends_long_streams_and_tells_health_watchers(after: AsyncExitStack) -> None:
    stopping = asyncio.Event()

    async def read(_: object) -> AsyncIterator[pb.ReadResponse]:
        yield pb.ReadResponse(data=b"first")
        await stopping.wait()
        raise NotReadyError("The server is shutting down.")

    async def drain() -> None:
        stopping.set()

    async with serving(Probe(read=read).service(), drain=drain, drain_s=30) as address:
        channel = await after.enter_async_context(connected(address))
        stream = stub(channel).Read(pb.ReadRequest())
        await stream.read()
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest(service=name)) for name in ("", SERVICE, "nobody")]
        firsts = [(await watch.read()).status for watch in watches]
        leaving = now()
    assert now() - leaving < 5
    response = health_pb2.HealthCheckResponse
    assert firsts == [response.SERVING, response.SERVING, response.SERVICE_UNKNOWN]
    lasts = [(await watch.read()).status for watch in watches]
    assert lasts == [response.NOT_SERVING, response.NOT_SERVING, response.SERVICE_UNKNOWN]
    for call in (stream, *watches):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_drain_that_fails_stops_the_server_all_the_same(after: AsyncExitStack) -> None:
    async def drain() -> None:
        raise RuntimeError("the application's own fault")

    server = serving(Probe(query=fine).service(), drain=drain)
    channel = await after.enter_async_context(connected(await server.__aenter__()))
    assert await ask(channel) == FINE
    with pytest.raises(RuntimeError, match="own fault"):
        await server.__aexit__(None, None, None)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await ask(channel)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_health_names_every_service_and_no_other() -> None:
    async with served(Probe().service()) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        for name in ("", SERVICE):
            answer = await health.Check(health_pb2.HealthCheckRequest(service=name))
            assert answer.status == health_pb2.HealthCheckResponse.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_two_servers_cannot_share_a_port() -> None:
    async with serving(Probe(query=fine).service()) as address:
        port = int(address.rpartition(":")[2])
        with pytest.raises(StartupError, match=rf"127\.0\.0\.1:{port}.*--port"):
            await serving(Probe(query=fine).service(), port=port).__aenter__()


async def test_an_ipv6_address_is_written_with_brackets() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    async with serving(Probe(query=fine).service(), host="::1") as address, connected(address) as channel:
        assert address.startswith("[::1]:")
        assert await ask(channel) == FINE


class Child:
    """A server in a process of its own."""

    def __init__(self, process: asyncio.subprocess.Process, ready: Path) -> None:
        self.process = process
        self.ready = ready

    async def address(self) -> str:
        async with asyncio.timeout(30):
            while not self.ready.exists():  # another process's file has no event
                assert self.process.returncode is None, "the server ended before it was ready"
                await asyncio.sleep(0.02)
        return self.ready.read_text(encoding="utf-8")

    async def ended(self) -> tuple[int, str]:
        async with asyncio.timeout(30):
            _, err = await self.process.communicate()
        assert self.process.returncode is not None
        return self.process.returncode, err.decode()


@asynccontextmanager
async def child(home: Path, stdin: int | None = None, **settings: object) -> AsyncIterator[Child]:
    ready = home / "ready"
    flags = {"home": str(home), "ready_file": str(ready), "log_format": "json", **settings}
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.rpc.child",
        json.dumps(flags),
        cwd=ROOT,
        env={key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")},
        stdin=asyncio.subprocess.DEVNULL if stdin is None else stdin,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        yield Child(process, ready)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_ends_the_process_with_success(number: signal.Signals, tmp_path: Path) -> None:
    async with child(tmp_path) as server:
        async with grpc.aio.insecure_channel(await server.address()) as channel:
            assert (await ask(channel)).complete
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stub(channel).QueryWriteStatus(pb.QueryWriteStatusRequest(digest="fail"))
        server.process.send_signal(number)
        code, err = await server.ended()
    assert code == 0
    assert not server.ready.exists()
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    events = [json.loads(line) for line in err.splitlines()]
    assert [entry["event"] for entry in events if entry["event"] != "unexpected error"] == [
        "ready",
        "call",
        "call",
        "draining",
        "stopped",
    ]
    assert all(entry["service"] == "probe" for entry in events)
    (failed,) = [entry for entry in events if entry["event"] == "unexpected error"]
    assert failed["request_id"] in caught.value.details()
    assert "a secret of the server" in json.dumps(failed["exception"])


@pytest.mark.parametrize("how", ["pipe", "file", "null"])
async def test_the_end_of_standard_input_ends_the_process(how: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 10_000)
    with (tmp_path / "file").open("rb") as file:
        stdin = {"pipe": asyncio.subprocess.PIPE, "file": file.fileno(), "null": asyncio.subprocess.DEVNULL}[how]
        async with child(tmp_path, stdin=stdin, stop_on_eof=True) as server:
            if server.process.stdin is not None:
                server.process.stdin.write(b"ignored\n")
                await server.address()
                server.process.stdin.close()
            code, err = await server.ended()
    assert code == 0, err
    assert "Traceback" not in err


async def test_standard_input_is_ignored_unless_asked(tmp_path: Path) -> None:
    async with child(tmp_path) as server, grpc.aio.insecure_channel(await server.address()) as channel:
        assert (await ask(channel)).complete


async def test_a_port_in_use_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        async with child(tmp_path, port=port) as server:
            code, err = await server.ended()
    assert code == 1
    assert f"StartupError: Cannot listen on 127.0.0.1:{port}" in err
    assert "--port" in err
    assert not server.ready.exists()


async def test_a_second_server_on_the_same_home_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    async with child(tmp_path) as first:
        await first.address()
        async with child(tmp_path, ready_file=str(tmp_path / "second")) as second:
            code, err = await second.ended()
        assert code == 1
        assert f"in use by process {first.process.pid}" in err
        first.process.kill()
        await first.process.wait()
    first.ready.unlink()
    async with child(tmp_path) as third:
        await third.address()


async def test_a_ready_file_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    async with child(tmp_path, ready_file=str(tmp_path / "nowhere" / "ready")) as server:
        code, err = await server.ended()
    assert code == 1
    assert f"Cannot write the ready file {tmp_path}/nowhere/ready" in err
