"""What a failed call raises."""

import asyncio
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import grpc
from google.protobuf.message import DecodeError
from google.rpc import error_details_pb2, status_pb2

_DETAILS_KEY = "grpc-status-details-bin"
# grpc.aio makes INTERNAL with this text of an answer that comes while a message is being sent, and loses the answer.
_OVERTAKEN = "Internal error from Core"


@dataclass(frozen=True)
class Violation:
    """One wrong field of a request: its path, and what was expected and came."""

    field: str
    description: str


class PenstockError(Exception):
    """A call that failed.

    `code` is gRPC's; `reason` is the name of an `ErrorReason` without its prefix, empty if the server gave none.
    """

    def __init__(
        self,
        message: str,
        code: grpc.StatusCode,
        reason: str = "",
        violations: tuple[Violation, ...] = (),
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code
        self.reason = reason
        self.violations = violations
        self.metadata = dict(metadata or {})

    @classmethod
    def from_rpc(cls, error: grpc.aio.AioRpcError) -> "PenstockError":
        """The error of a finished call, with the typed details the server sent along."""
        reason, metadata = "", dict[str, str]()
        violations: tuple[Violation, ...] = ()
        for detail in _status(error).details:
            info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            if detail.Unpack(info):
                reason, metadata = info.reason, dict(info.metadata)
            elif detail.Unpack(bad):
                violations = tuple(Violation(found.field, found.description) for found in bad.field_violations)
        return cls(error.details() or error.code().name, _code(error), reason, violations, metadata)


def _code(error: grpc.aio.AioRpcError) -> grpc.StatusCode:
    overtaken = error.code() is grpc.StatusCode.INTERNAL and error.details() == _OVERTAKEN
    return grpc.StatusCode.UNAVAILABLE if overtaken else error.code()


def _status(error: grpc.aio.AioRpcError) -> status_pb2.Status:
    for key, value in error.trailing_metadata() or ():
        if key == _DETAILS_KEY and isinstance(value, bytes):
            try:
                return status_pb2.Status.FromString(value)
            except DecodeError:
                break
    return status_pb2.Status()


Response = TypeVar("Response")


async def answer(call: Awaitable[Response]) -> Response:
    """Awaits a unary call. Raises `PenstockError` if it fails."""
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        raise PenstockError.from_rpc(error) from error
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        # Nobody cancelled this task: grpc.aio cancels its own call where the answer overtakes the end of a stream.
        text = "The server answered while the request was still being sent, and the answer was lost. Try again."
        raise PenstockError(text, grpc.StatusCode.UNAVAILABLE) from error
