"""Another worker of the same server, called over its socket."""

from typing import TYPE_CHECKING, Any

import grpc
from google.protobuf.message import Message
from structlog.contextvars import get_contextvars

from penstock.oip.inference_pb2_grpc import GRPCInferenceServiceStub
from penstock.rpc.calls import REQUEST_ID_KEY, late
from penstock.rpc.config import ServerSettings
from penstock.rpc.errors import NotReadyError, PenstockError
from penstock.rpc.status import DETAILS_KEY, from_status

if TYPE_CHECKING:
    _Call = grpc.aio.UnaryUnaryMultiCallable[Any, Any]

# Beside the protocol's methods: this worker's metrics, in the form of `penstock.inference.worker_metrics`.
METRICS = "/penstock.inference.Worker/Metrics"


class UnreachableError(NotReadyError):
    """The other worker did not answer at all."""


class Peer:
    """Raises what the other worker raised, `UnreachableError` where it said nothing, `DeadlineError` where it was slow.

    A worker that has not come up yet is waited for: this one may take calls before all of them do.
    """

    def __init__(self, settings: ServerSettings, number: int) -> None:
        self.number = number
        self._channel = grpc.aio.insecure_channel(
            settings.worker_address(number),
            options=[
                ("grpc.max_receive_message_length", settings.max_message_bytes),
                ("grpc.initial_reconnect_backoff_ms", 100),
                ("grpc.max_reconnect_backoff_ms", 1_000),
            ],
        )
        self._stub = GRPCInferenceServiceStub(self._channel)
        self._metrics: _Call = self._channel.unary_unary(METRICS)

    async def call(self, method: str, request: Message, timeout_s: float | None) -> Message:
        """What the other worker answers to a call of the Open Inference Protocol."""
        answer: Message = await self._ask(getattr(self._stub, method), request, timeout_s)
        return answer

    async def metrics(self, timeout_s: float) -> bytes:
        packed: bytes = await self._ask(self._metrics, b"", timeout_s)
        return packed

    async def close(self) -> None:
        await self._channel.close()

    async def _ask(self, call: "_Call", request: object, timeout_s: float | None) -> Any:  # noqa: ANN401  # any message
        # One id for one call of a client, in the log of every worker.
        request_id = get_contextvars().get("request_id")
        metadata = ((REQUEST_ID_KEY, request_id),) if request_id else ()
        try:
            return await call(request, timeout=timeout_s, metadata=metadata, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            raise self._raised(error) from error

    def _raised(self, error: grpc.aio.AioRpcError) -> PenstockError:
        for key, value in error.trailing_metadata() or ():
            if key == DETAILS_KEY and isinstance(value, bytes):
                return from_status(error.details() or "", value)
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return late()
        return UnreachableError(
            f"Worker {self.number} of this server cannot be reached: {error.details()}. Call again later."
        )
