"""The processes behind a port: start, drain, deaths, workers, TLS; the same on every transport."""

import asyncio
import json
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.integration.rpc.conformance import (
    ROOT,
    TRANSPORTS,
    Server,
    Wire,
    ask,
    eventually_idle,
    method,
    needs_pyvoy,
    serving,
    started,
    state,
)
from tests.integration.rpc.conformance_app import NAME

each_transport = pytest.mark.parametrize("transport", TRANSPORTS)
# What has a supervisor.
each_supervised = pytest.mark.parametrize(
    ("transport", "workers"), [pytest.param("envoy", 1, marks=needs_pyvoy), ("grpcio", 2)]
)


def alive(pids: list[int]) -> list[int]:
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


async def gone(pids: list[int]) -> None:
    async with asyncio.timeout(15):
        while alive(pids):  # noqa: ASYNC110  # a process that is no child has no event
            await asyncio.sleep(0.02)


@each_transport
@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, "eof"])
async def test_a_stop_lets_calls_finish_and_refuses_new_ones(transport: str, how: Any, tmp_path: Path) -> None:
    async with serving(tmp_path, transport=transport, stop_on_eof=how == "eof", drain_s=10) as server:
        async with server.channel() as channel, server.channel() as other:
            assert await ask(other, b"x") == b"x"
            watch = health_pb2_grpc.HealthStub(other).Watch(health_pb2.HealthCheckRequest())
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
            call = asyncio.ensure_future(ask(channel, b"sleep:1"))
            while (await state(channel))["in_progress"] != 1:  # noqa: ASYNC110  # another process
                await asyncio.sleep(0.01)
            pids = server.processes()
            if how == "eof":
                server.process.stdin.close()
            else:
                server.process.send_signal(how)
            assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await ask(other, b"new")
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert await call == b"sleep:1"
        assert await server.ended() == 0
    events = [json.loads(line)["event"] for line in server.log.read_text().splitlines()]
    assert [event for event in events if event != "call"] == ["ready", "draining", "stopped"]
    assert not alive(pids)
    assert not (tmp_path / "ready").exists()


@each_transport
async def test_a_draining_connection_is_told_to_go_away(transport: str, tmp_path: Path) -> None:
    async with serving(tmp_path, transport=transport) as server, server.channel() as channel:
        call = asyncio.ensure_future(ask(channel, b"sleep:1"))
        while (await state(channel))["in_progress"] != 1:  # noqa: ASYNC110  # another process
            await asyncio.sleep(0.01)
        with Wire(server.address) as wire:
            server.process.terminate()
            await asyncio.sleep(0.2)  # the signal has nobody to say that it has arrived
            wire.call(1, f"/{NAME}/Unary")
            wire.data(1, b"\0\0\0\0\0", end=True)
            assert await asyncio.to_thread(wire.ending, -1) == "hung up"
            assert Wire.GOAWAY in wire.kinds
        assert await call == b"sleep:1"
        assert await server.ended() == 0


@needs_pyvoy
async def test_auto_is_envoy_where_it_can_run(tmp_path: Path) -> None:
    async with serving(tmp_path, transport="auto") as server:
        _, child = server.processes()
        assert Path(f"/proc/{child}/comm").read_text().strip() == "envoy"


@each_transport
async def test_a_call_that_outlasts_the_drain_is_cut(transport: str, tmp_path: Path) -> None:
    async with serving(tmp_path, transport=transport, drain_s=0.2) as server, server.channel() as channel:
        call = method(channel, "Down")(BytesValue(value=b"1,1,wait"))
        await call.read()
        server.process.terminate()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert await server.ended() == 0


@each_supervised
async def test_workers_end_with_their_supervisor_however_it_ends(transport: str, workers: int, tmp_path: Path) -> None:
    async with serving(tmp_path, transport=transport, workers=workers) as server:
        pids = server.processes()
        assert len(pids) == workers + 1
        server.process.kill()
        await gone(pids[1:])


@each_supervised
async def test_a_worker_that_dies_ends_the_server_with_an_error(transport: str, workers: int, tmp_path: Path) -> None:
    async with serving(tmp_path, transport=transport, workers=workers) as server, server.channel() as channel:
        pids = server.processes()
        with pytest.raises(grpc.aio.AioRpcError):
            await ask(channel, b"exit:")
        assert await server.ended() == 1
        assert not alive(pids)
    assert "ended with exit code 3" in server.log.read_text()


@each_transport
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"broken": "startup"}, "Error: This application does not start."),
        ({"ready_file": "/nowhere/ready"}, "Cannot write the ready file /nowhere/ready"),
        ({"tls_cert": "/nowhere"}, "tls_cert and tls_key belong together"),
        ({"tls_cert": "/nowhere", "tls_key": "/nowhere"}, "Cannot read tls_cert, /nowhere"),
        ({"host": "192.0.2.1"}, "Cannot listen on 192.0.2.1:0: the address is not this machine's"),
    ],
)
async def test_what_keeps_it_from_starting_is_told(
    transport: str, settings: dict[str, object], message: str, tmp_path: Path
) -> None:
    async with started(tmp_path, transport=transport, **settings) as server:
        assert await server.ended() == 1
        assert server.address == ""
    log = server.log.read_text()
    assert message in log
    assert "Traceback" not in log


@each_transport
async def test_a_port_in_use_is_told(transport: str, tmp_path: Path) -> None:
    (tmp_path / "second").mkdir()
    async with serving(tmp_path, transport=transport) as first:
        port = int(first.address.rpartition(":")[2])
        async with started(tmp_path / "second", transport=transport, port=port) as second:
            assert await second.ended() == 1
        assert f"Cannot listen on 127.0.0.1:{port}" in second.log.read_text()


@needs_pyvoy
async def test_a_bug_at_start_is_logged_and_told(tmp_path: Path) -> None:
    async with started(tmp_path, transport="envoy", broken="bug") as server:
        assert await server.ended() == 1
    log = server.log.read_text()
    assert "Error: The service could not start: RuntimeError: hunter2." in log
    assert '"event": "unexpected error"' in log


@needs_pyvoy
async def test_no_admin_port_is_open_and_the_socket_is_its_owners(tmp_path: Path) -> None:
    async with serving(tmp_path, transport="envoy") as server:
        _, envoy = server.processes()
        inodes = {str(fd.readlink())[8:-1] for fd in Path(f"/proc/{envoy}/fd").iterdir()}
        rows = [line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:]]
        listening = {row[1].rpartition(":")[2] for row in rows if row[3] == "0A" and row[9] in inodes}
        assert listening == {f"{int(server.address.rpartition(':')[2]):04X}"}


@each_transport
async def test_start_to_ready_and_memory_leave_room(transport: str, tmp_path: Path) -> None:
    began = time.monotonic()
    async with serving(tmp_path, transport=transport) as server:
        # Figures for a service are measured elsewhere; this notices what would double them.
        assert time.monotonic() - began < 10
        assert server.resident_mib() < {"envoy": 200, "grpcio": 110}[transport]


@each_transport
async def test_two_workers_share_a_port_and_stop_together(transport: str, tmp_path: Path) -> None:
    async with serving(tmp_path, transport=transport, workers=2) as server:
        seen: Counter[int] = Counter()
        for _ in range(60):
            async with server.channel() as channel:
                seen[(await state(channel))["pid"]] += 1
            if len(seen) == 2:
                break
        assert set(seen) == set(server.processes()[1:])
        homes = sorted(path.name for path in (tmp_path / "home" / "conformance").iterdir())
        assert homes == ["worker-0", "worker-1"]
        server.process.terminate()
        assert await server.ended() == 0


@each_transport
async def test_one_call_too_many_is_refused(transport: str, tmp_path: Path) -> None:
    async with serving(tmp_path, transport=transport, max_concurrent_calls=1) as server, server.channel() as channel:
        first = asyncio.ensure_future(ask(channel, b"sleep:0.5"))
        await asyncio.sleep(0.2)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ask(channel, b"x")
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert await first == b"sleep:0.5"


@each_transport
async def test_probes_that_stay_are_bounded_too(transport: str, tmp_path: Path) -> None:
    async with serving(tmp_path, transport=transport, max_concurrent_calls=3) as server, server.channel() as channel:
        health = health_pb2_grpc.HealthStub(channel)
        watches = [health.Watch(health_pb2.HealthCheckRequest()) for _ in range(8)]
        first = await asyncio.gather(*(watch.read() for watch in watches), return_exceptions=True)
        refused = [one.code() for one in first if isinstance(one, grpc.aio.AioRpcError)]
        assert refused == [grpc.StatusCode.RESOURCE_EXHAUSTED] * 5
        if transport == "envoy":
            # Neither of them keeps the other from being answered.
            assert (await health.Check(health_pb2.HealthCheckRequest())).status
            assert await ask(channel, b"x") == b"x"
        for watch in watches:
            watch.cancel()
        async with asyncio.timeout(10):
            while isinstance(await _first(health), grpc.aio.AioRpcError):  # noqa: ASYNC110  # the server tells nobody
                await asyncio.sleep(0.05)


async def _first(health: health_pb2_grpc.HealthStub) -> Any:
    """The first message of a watch, or how it was refused."""
    (first,) = await asyncio.gather(health.Watch(health_pb2.HealthCheckRequest()).read(), return_exceptions=True)
    return first


@each_transport
async def test_answers_are_compressed_where_that_is_set(transport: str, tmp_path: Path) -> None:
    async with serving(tmp_path, transport=transport, response_compression="gzip") as server:
        async with server.channel() as channel:
            for name in ("Unary", "Quick"):
                assert await ask(channel, bytes(500_000), name) == bytes(500_000)
            down = method(channel, "Down")(BytesValue(value=b"3,500000,"))
            assert [len(answer.value) async for answer in down] == [500_000] * 3
            with Wire(server.address) as wire:
                wire.call(1, f"/{NAME}/Unary", grpc_accept_encoding="gzip")
                wire.data(1, b"\0\0\0\0\x0c\x0a\x0abig:100000", end=True)
                assert await asyncio.to_thread(wire.ending, 1) == "ended"
                assert wire.received < 10_000
        async with server.channel(("grpc.compression_enabled_algorithms_bitset", 1)) as channel:
            assert await ask(channel, bytes(500_000)) == bytes(500_000)


CLIENT = """
import asyncio, sys
from tests.integration.rpc.conformance import BytesValue, Server, method
async def main():
    server = Server(None, None)
    server.address = sys.argv[1]
    async with server.channel() as channel:
        calls = [method(channel, "Down")(BytesValue(value=b"1,1,wait")) for _ in range(50)]
        calls += [method(channel, "Both")() for _ in range(50)]
        await asyncio.gather(*(call.read() for call in calls[:50]))
        await asyncio.gather(*(call.write(BytesValue(value=b"x")) for call in calls[50:]))
        await asyncio.gather(*(call.read() for call in calls[50:]))
        print("in", flush=True)
        await asyncio.Event().wait()
asyncio.run(main())
"""


@each_transport
async def test_killed_clients_leave_nothing_behind(transport: str, tmp_path: Path) -> None:
    async with serving(tmp_path, transport=transport) as server, server.channel() as channel:
        for _ in range(2):
            client = await asyncio.create_subprocess_exec(
                *(sys.executable, "-c", CLIENT, server.address), cwd=ROOT, stdout=asyncio.subprocess.PIPE
            )
            assert client.stdout
            await client.stdout.readline()
            assert (await state(channel))["in_progress"] == 100
            client.kill()
            await client.wait()
            await eventually_idle(channel)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and a certificate of it for the server and for a client."""
    folder = tmp_path_factory.mktemp("certificates")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *key, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", "/CN=authority")
    (folder / "names").write_text("subjectAltName=DNS:localhost,IP:127.0.0.1")
    for name in ("server", "client"):
        openssl("req", *key, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-extfile", "names", "-days", "2"]
        openssl("x509", "-req", "-in", f"{name}.csr", "-out", f"{name}.pem", *signing)
    return folder


def secure(server: Server, certificates: Path, *, client: bool) -> grpc.aio.Channel:
    own = [(certificates / f"client.{kind}").read_bytes() for kind in ("key", "pem")] if client else [None, None]
    credentials = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes(), *own)
    return grpc.aio.secure_channel(server.address, credentials)


@each_transport
@pytest.mark.parametrize("mutual", [False, True])
async def test_tls(transport: str, mutual: bool, certificates: Path, tmp_path: Path) -> None:
    files: dict[str, object] = {
        "tls_cert": str(certificates / "server.pem"),
        "tls_key": str(certificates / "server.key"),
    }
    if mutual:
        files["tls_client_ca"] = str(certificates / "ca.pem")
    async with serving(tmp_path, transport=transport, **files) as server:
        async with secure(server, certificates, client=True) as channel:
            assert await ask(channel, b"secret") == b"secret"
        async with secure(server, certificates, client=False) as channel:
            if mutual:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await ask(channel, b"secret", timeout=5)
                assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            else:
                assert await ask(channel, b"secret") == b"secret"
        async with server.channel() as channel:
            with pytest.raises(grpc.aio.AioRpcError):
                await ask(channel, b"in the clear", timeout=1)


@each_transport
async def test_ipv6(transport: str, tmp_path: Path) -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    async with serving(tmp_path, transport=transport, host="::1") as server, server.channel() as channel:
        assert server.address.startswith("[::1]:")
        assert await ask(channel, b"x") == b"x"
