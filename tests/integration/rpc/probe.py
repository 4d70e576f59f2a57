"""A servicer whose methods a test chooses, served as every Penstock server serves."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from pydantic_settings import SettingsConfigDict

from penstock.api.registry.v1 import artifact_service_pb2 as pb
from penstock.api.registry.v1 import artifact_service_pb2_grpc as rpc
from penstock.rpc.config import ServerSettings
from penstock.rpc.server import Application, Service, listening
from penstock.rpc.status import DETAILS_KEY


class ProbeSettings(ServerSettings):
    section = "probe"
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_PROBE_", extra="forbid", frozen=True)


async def unused(*_: object) -> object:
    raise AssertionError("this method is not part of the test")


class Probe(rpc.ArtifactServiceServicer):
    """`query` answers one message, `read` streams answers, `write` takes a stream."""

    def __init__(
        self,
        query: Callable[[Any], Awaitable[object]] = unused,
        read: Callable[[Any], AsyncIterator[Any]] = unused,
        write: Callable[[Any], Awaitable[object]] = unused,
    ) -> None:
        self._query, self._read, self._write = query, read, write

    def service(self) -> Service:
        return Service(pb.DESCRIPTOR, lambda server: rpc.add_ArtifactServiceServicer_to_server(self, server))

    async def QueryWriteStatus(self, request: pb.QueryWriteStatusRequest, context: object) -> object:
        return await self._query(request)

    async def Read(self, request: pb.ReadRequest, context: object) -> AsyncIterator[Any]:
        async for response in self._read(request):
            yield response

    async def Write(self, request_iterator: AsyncIterator[pb.WriteRequest], context: object) -> object:
        return await self._write(request_iterator)


async def nothing() -> None:
    """A drain with nothing to end."""


def serving(
    *services: Service, drain: Callable[[], Awaitable[None]] = nothing, **settings: object
) -> AbstractAsyncContextManager[str]:
    """A server of these services on a free port of the loopback."""
    given = ProbeSettings.load({"home": "/unused", "drain_s": 1, **settings})
    return listening(given, Application(services, drain))


def connected(address: str) -> grpc.aio.Channel:
    """A channel without retries: a test sees what the server said."""
    return grpc.aio.insecure_channel(address, options=[("grpc.enable_retries", 0)])


@asynccontextmanager
async def served(*services: Service, **settings: object) -> AsyncIterator[grpc.aio.Channel]:
    """A channel to a server of these services."""
    async with serving(*services, **settings) as address, connected(address) as channel:
        yield channel


def stub(channel: grpc.aio.Channel) -> "rpc.ArtifactServiceAsyncStub":
    return rpc.ArtifactServiceStub(channel)


def details(error: grpc.aio.AioRpcError) -> tuple[error_details_pb2.ErrorInfo, error_details_pb2.BadRequest]:
    """What an error carries for programs."""
    trailers = dict(error.trailing_metadata())
    status = status_pb2.Status.FromString(trailers[DETAILS_KEY])
    assert status.code == error.code().value[0]
    assert status.message == error.details()
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        assert detail.Unpack(info) or detail.Unpack(bad)
    return info, bad
