"""What the conformance suite serves on every transport: one method of each shape, and one that tells about the rest."""

import asyncio
import json
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import grpc
import structlog
from google.protobuf import descriptor_pb2, descriptor_pool, wrappers_pb2
from google.protobuf.wrappers_pb2 import BytesValue
from pydantic_settings import SettingsConfigDict

from penstock.rpc import errors
from penstock.rpc.config import ServerSettings
from penstock.rpc.errors import StartupError
from penstock.rpc.methods import Encoded
from penstock.rpc.server import Application, Service

NAME = "conformance.Echo"
METHODS = {"Unary": (False, False), "Quick": (False, False), "Down": (False, True), "Up": (True, False)}
METHODS |= {"Both": (True, True), "State": (False, False)}

ERRORS: dict[str, errors.PenstockError] = {}
for _kind in errors.PenstockError.__subclasses__():
    if _kind is errors.InvalidFieldError:
        ERRORS[_kind.__name__] = errors.InvalidFieldError.of("field[2]", "expected ü; got %")
    elif _kind is errors.NotFoundError:
        ERRORS[_kind.__name__] = errors.NotFoundError("thing", "näme\n", "Make it first.")
    elif _kind.__module__ == errors.__name__:
        ERRORS[_kind.__name__] = _kind(f"A {_kind.__name__}: 100% of „it“.", key="value")


class ConformanceSettings(ServerSettings):
    section = "conformance"
    allows_workers = True
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_CONFORMANCE_", extra="forbid", frozen=True)
    broken: str = ""


def _file() -> Any:
    file = descriptor_pb2.FileDescriptorProto(
        name="conformance.proto", package="conformance", dependency=[wrappers_pb2.DESCRIPTOR.name], syntax="proto3"
    )
    service = file.service.add(name="Echo")
    for name, (up, down) in METHODS.items():
        value = ".google.protobuf.BytesValue"
        service.method.add(name=name, input_type=value, output_type=value, client_streaming=up, server_streaming=down)
    pool = descriptor_pool.DescriptorPool()
    pool.AddSerializedFile(wrappers_pb2.DESCRIPTOR.serialized_pb)
    pool.AddSerializedFile(file.SerializeToString())
    return pool.FindFileByName(file.name)


class Echo:
    """The servicer. What a call is to do stands in its message."""

    def __init__(self) -> None:
        self.in_progress = 0
        self.cancelled = 0

    @asynccontextmanager
    async def counted(self) -> AsyncIterator[None]:
        self.in_progress += 1
        try:
            yield
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled += 1
            raise
        finally:
            self.in_progress -= 1

    async def Unary(self, request: BytesValue, context: Any) -> Any:
        async with self.counted():
            what, _, value = request.value[:100].partition(b":")
            return BytesValue(value=await self._done(what.decode("latin-1"), value.decode("latin-1"), context, request))

    async def _done(self, what: str, value: str, context: Any, request: BytesValue) -> bytes:  # noqa: C901  # a table
        match what:
            case "raise":
                structlog.get_logger("handler").warning("about to raise")
                raise RuntimeError("hunter2")
            case "error":
                raise ERRORS[value]
            case "abort":
                await context.abort(grpc.StatusCode.DATA_LOSS, "gone ü", (("why", "because"),))
            case "code":
                context.set_code(grpc.StatusCode.FAILED_PRECONDITION)
                context.set_details("set")
            case "unimplemented":
                context.set_code(grpc.StatusCode.UNIMPLEMENTED)
                raise NotImplementedError("Method not implemented!")
            case "sleep":
                await asyncio.sleep(float(value))
            case "stubborn":
                try:
                    await asyncio.sleep(float(value))
                except asyncio.CancelledError:
                    return b"went on"
            case "remaining":
                return str(context.time_remaining()).encode()
            case "exit":
                os._exit(3)
            case "big":
                return bytes(int(value))
            case "metadata":
                await context.send_initial_metadata((("first", "1"), ("first-bin", b"\0\xff")))
                context.set_trailing_metadata((("last", "2"), ("last-bin", b"\xfe\0")))
                return repr([tuple(pair) for pair in context.invocation_metadata()]).encode()
        return request.value

    async def Quick(self, request: bytes, context: Any) -> Encoded:
        """Takes and gives bytes: the wire form of a BytesValue begins with its tag and length."""
        if bytes(request[2:8]) == b"error:":
            raise ERRORS[bytes(request[8:]).decode()]
        return Encoded(bytes(request[:1]), memoryview(request)[1:])

    async def Down(self, request: BytesValue, context: Any) -> AsyncIterator[BytesValue]:
        count, size, then = request.value.decode().split(",")
        async with self.counted():
            for _ in range(int(count)):
                yield BytesValue(value=bytes(int(size)))
            if then == "wait":
                await asyncio.Event().wait()
            elif then:
                raise ERRORS[then]

    async def Up(self, requests: AsyncIterator[BytesValue], context: Any) -> BytesValue:
        total = 0
        async with self.counted():
            async for request in requests:
                if request.value == b"wait":
                    await asyncio.Event().wait()
                if request.value.startswith(b"error:"):
                    raise ERRORS[request.value[6:].decode()]
                total += len(request.value)
        return BytesValue(value=str(total).encode())

    async def Both(self, requests: AsyncIterator[BytesValue], context: Any) -> AsyncIterator[BytesValue]:
        async with self.counted():
            async for request in requests:
                if request.value.startswith(b"error:"):
                    raise ERRORS[request.value[6:].decode()]
                yield request

    async def State(self, request: BytesValue, context: Any) -> BytesValue:
        state = {"pid": os.getpid(), "in_progress": self.in_progress, "cancelled": self.cancelled}
        return BytesValue(value=json.dumps(state).encode())


def add_to_server(servicer: Echo, server: Any) -> None:
    makers = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    handlers = {
        name: makers[shape](getattr(servicer, name), BytesValue.FromString, BytesValue.SerializeToString)
        for name, shape in METHODS.items()
    }
    server.add_registered_method_handlers(NAME, handlers)


@asynccontextmanager
async def application(settings: ConformanceSettings) -> AsyncIterator[Application]:
    servicer = Echo()
    file = _file()
    if settings.broken == "startup":
        raise StartupError("This application does not start.")
    if settings.broken == "bug":
        raise RuntimeError("hunter2")
    (settings.service_home).mkdir(parents=True)

    async def drain() -> None:
        """Nothing here waits for anybody."""

    yield Application(
        [
            Service(
                file,
                lambda server: add_to_server(servicer, server),
                quiet=frozenset({"Quick"}),
                readers={"Quick": lambda data: data},
            )
        ],
        drain,
    )
