"""Health of each service and of the whole server, after the gRPC health checking protocol (grpc.health.v1).

grpcio-health-checking's own servicer writes to watchers while it holds a lock, so one watcher that does not read
would keep a server from stopping, and its watchers would outlast any drain.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable

from grpc_health.v1 import health_pb2 as pb
from grpc_health.v1 import health_pb2_grpc as rpc

from penstock.rpc.errors import NotFoundError, NotReadyError


class HealthServicer(rpc.HealthServicer):  # type: ignore[misc]  # grpc_health publishes no types
    """Every service serves until the server drains. The empty name stands for the whole server."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(("", *names))
        self._draining = asyncio.Event()

    def drain(self) -> None:
        """Announces that nothing is served any more, and ends the watches."""
        self._draining.set()

    async def Check(self, request: pb.HealthCheckRequest, context: object) -> pb.HealthCheckResponse:
        status = self._status(request.service)
        if status == pb.HealthCheckResponse.SERVICE_UNKNOWN:
            raise NotFoundError("service", request.service)
        return pb.HealthCheckResponse(status=status)

    async def Watch(self, request: pb.HealthCheckRequest, context: object) -> AsyncIterator[pb.HealthCheckResponse]:
        yield pb.HealthCheckResponse(status=self._status(request.service))
        await self._draining.wait()
        yield pb.HealthCheckResponse(status=self._status(request.service))
        raise NotReadyError("The server is shutting down. Watch again on another one.")

    def _status(self, service: str) -> int:
        if service not in self._names:
            return int(pb.HealthCheckResponse.SERVICE_UNKNOWN)
        if self._draining.is_set():
            return int(pb.HealthCheckResponse.NOT_SERVING)
        return int(pb.HealthCheckResponse.SERVING)
