"""A conformance server in a process of its own, on any transport, and what the suite asks and measures of it."""

import asyncio
import json
import os
import socket
import struct
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self

import grpc
import pytest
from google.protobuf.wrappers_pb2 import BytesValue
from tests.integration.rpc.conformance_app import METHODS, NAME

from penstock.rpc.launch import missing_for_envoy

ROOT = Path(__file__).parents[3]
OPTIONS = [
    ("grpc.enable_retries", 0),
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]

needs_pyvoy = pytest.mark.skipif(bool(missing_for_envoy()), reason=missing_for_envoy() or "envoy can run here")
TRANSPORTS = ["grpcio", pytest.param("envoy", marks=needs_pyvoy)]


class Server:
    """The process that was started, which is the supervisor where there is one."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self.process = process
        self.log = log
        self.address = ""

    def channel(self, *options: tuple[str, object]) -> grpc.aio.Channel:
        return grpc.aio.insecure_channel(self.address, options=[*OPTIONS, *options])

    async def ended(self) -> int:
        async with asyncio.timeout(30):
            return await self.process.wait()

    def processes(self) -> list[int]:
        """The server's processes: the one that was started, and its children."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [self.process.pid, *map(int, children.split())]

    def resident_mib(self) -> float:
        status = [Path(f"/proc/{pid}/status").read_text() for pid in self.processes()]
        return sum(int(text.split("VmRSS:")[1].split()[0]) for text in status) / 1024


@asynccontextmanager
async def started(folder: Path, **settings: object) -> AsyncIterator[Server]:
    """A server that may not come up."""
    ready, log = folder / "ready", folder / "log"
    flags = {"home": str(folder / "home"), "ready_file": str(ready), "log_format": "json", "drain_s": 5, **settings}
    with log.open("ab") as stderr:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "tests.integration.rpc.conformance_server", json.dumps(flags)),
            cwd=ROOT,
            env={key: value for key, value in os.environ.items() if not key.startswith("PENSTOCK_")},
            stdin=asyncio.subprocess.PIPE,
            stderr=stderr,
        )
    server = Server(process, log)
    try:
        async with asyncio.timeout(30):
            while not ready.exists() and process.returncode is None:  # noqa: ASYNC110  # a file has no event
                await asyncio.sleep(0.01)
        server.address = ready.read_text() if ready.exists() else ""
        yield server
    finally:
        if process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 20)
            except TimeoutError:
                process.kill()
                await process.wait()


@asynccontextmanager
async def serving(folder: Path, **settings: object) -> AsyncIterator[Server]:
    """A server that takes calls."""
    async with started(folder, **settings) as server:
        assert server.address, server.log.read_text()
        yield server


def method(channel: grpc.aio.Channel, name: str) -> Any:
    up, down = METHODS[name]
    make = getattr(channel, f"{'stream' if up else 'unary'}_{'stream' if down else 'unary'}")
    return make(f"/{NAME}/{name}", BytesValue.SerializeToString, BytesValue.FromString)


async def ask(channel: grpc.aio.Channel, value: bytes, name: str = "Unary", **options: object) -> bytes:
    return (await method(channel, name)(BytesValue(value=value), **options)).value


async def state(channel: grpc.aio.Channel) -> dict[str, int]:
    return json.loads(await ask(channel, b"", "State"))


async def eventually_idle(channel: grpc.aio.Channel, limit_s: float = 10) -> dict[str, int]:
    """The state once no handler is left."""
    async with asyncio.timeout(limit_s):
        while (found := await state(channel))["in_progress"]:  # noqa: ASYNC110  # another process
            await asyncio.sleep(0.02)
    return found


class Wire:
    """A client that writes HTTP/2 frames by hand, and so can stop in the middle of anything."""

    PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    DATA, HEADERS, RST, SETTINGS, GOAWAY = 0, 1, 3, 4, 7

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)), timeout=5)
        self.received = 0
        self.kinds: set[int] = set()
        self.socket.sendall(self.PREFACE + self.frame(self.SETTINGS, 0, 0, b""))

    @staticmethod
    def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
        return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + payload

    def headers(self, stream: int, fields: dict[str, str], *, end: bool = False) -> None:
        """Literal header fields, without a table and without Huffman's code."""
        block = b"".join(b"\0" + self._text(name) + self._text(value) for name, value in fields.items())
        self.socket.sendall(self.frame(self.HEADERS, 4 | end, stream, block))

    def call(self, stream: int, path: str, **more: str) -> None:
        fields = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "localhost", "te": "trailers"}
        fields |= {"content-type": "application/grpc"}
        self.headers(stream, fields | {name.replace("_", "-"): value for name, value in more.items()})

    def data(self, stream: int, payload: bytes, *, end: bool = False) -> None:
        self.socket.sendall(self.frame(self.DATA, int(end), stream, payload))

    def ending(self, stream: int) -> str:
        """How the stream or the connection ended; raises `TimeoutError` if neither does."""
        while True:
            try:
                head = self._exactly(9)
                self._exactly(int.from_bytes(head[:3], "big"))
            except ConnectionError:
                return "hung up"
            kind, flags, (number,) = head[3], head[4], struct.unpack(">I", head[5:])
            self.kinds.add(kind)
            if number == stream and (kind == self.RST or (kind in {self.DATA, self.HEADERS} and flags & 1)):
                return "reset" if kind == self.RST else "ended"

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            more = self.socket.recv(count - len(data))
            if not more:
                raise ConnectionError("the server hung up")
            data += more
        self.received += count
        return data

    @staticmethod
    def _text(text: str) -> bytes:
        assert len(text) < 127
        return bytes((len(text),)) + text.encode()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
