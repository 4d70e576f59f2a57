"""A worker's line to the training service: its lease, its heartbeat, and calls that outlast a pause of the service."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

import grpc

from penstock.api.training.v1 import worker_service_pb2 as pb
from penstock.api.training.v1.worker_service_pb2_grpc import WorkerServiceStub
from penstock.client.errors import PenstockError, answer

# Far under a third of any lease, so that a cancelled job hears of it at once.
_MAX_HEARTBEAT_S = 1.0
_CALL_TIMEOUT_S = 30.0
_FIRST_PAUSE_S = 0.2
_LONGEST_PAUSE_S = 5.0

TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.OUT_OF_RANGE,
}

Request = TypeVar("Request")
Response = TypeVar("Response")


class LeaseLostError(Exception):
    """The job is another worker's, or nobody can tell: this one must exit without doing anything more."""


class Link:
    """The WorkerService, for one lease. `cancelled` is set once the job is being cancelled."""

    def __init__(self, channel: grpc.aio.Channel, lease: pb.Lease) -> None:
        self.stub = WorkerServiceStub(channel)
        self.lease = lease
        self.cancelled = threading.Event()

    async def call(self, method: Callable[..., Awaitable[Response]], request: object) -> Response:
        """Calls until the service has answered: who waits too long for it is ended by `keep_lease`.

        Raises `LeaseLostError`, or `PenstockError` for an answer that will not change.
        """
        return await persistently(lambda: answer(method(request, timeout=_CALL_TIMEOUT_S)))

    async def keep_lease(self, lease_s: float) -> None:
        """Prolongs the lease for ever. Raises `LeaseLostError` when that cannot be done any more."""
        kept = time.monotonic()
        interval_s = min(lease_s / 3, _MAX_HEARTBEAT_S)
        while True:
            await asyncio.sleep(interval_s)
            try:
                sent = time.monotonic()
                response = await answer(self.stub.Heartbeat(pb.HeartbeatRequest(lease=self.lease), timeout=lease_s / 3))
            except PenstockError as error:
                if error.code is grpc.StatusCode.PERMISSION_DENIED:
                    raise LeaseLostError(error.message) from error
                if time.monotonic() - kept > lease_s:
                    raise LeaseLostError(f"the service was out of reach for {lease_s:g} s: {error.message}") from error
            else:
                kept = sent
                self.take_note(response.cancel_requested)

    def take_note(self, cancel_requested: bool) -> None:
        if cancel_requested:
            self.cancelled.set()


async def persistently(call: Callable[[], Awaitable[Response]]) -> Response:
    """Repeats a call for as long as its server is away or full. Raises `LeaseLostError`, `PenstockError`."""
    pause_s = _FIRST_PAUSE_S
    while True:
        try:
            return await call()
        except PenstockError as error:
            if error.code is grpc.StatusCode.PERMISSION_DENIED:
                raise LeaseLostError(error.message) from error
            if error.code not in TRANSIENT:
                raise
        await asyncio.sleep(pause_s)
        pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
