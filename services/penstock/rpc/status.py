"""The one table from an error's reason to its status on the wire."""

from collections.abc import Sequence

import grpc
from google.protobuf import any_pb2, message
from google.rpc import error_details_pb2, status_pb2

from penstock.api.types.v1.error_reason_pb2 import ErrorReason
from penstock.rpc.errors import InvalidFieldError, PenstockError, Violation

DOMAIN = "penstock"

# Metadata above 8 KiB may be refused by the client, which then sees neither status nor text. The message goes twice, in
# grpc-message with up to three bytes for one.
_MESSAGE_BYTES = 1024
_METADATA_BYTES = 256
_VIOLATIONS_BYTES = 1536

# The metadata key under which gRPC carries a serialized google.rpc.Status.
DETAILS_KEY = "grpc-status-details-bin"

CODES: dict["ErrorReason.ValueType", grpc.StatusCode] = {
    ErrorReason.ERROR_REASON_INVALID_FIELD: grpc.StatusCode.INVALID_ARGUMENT,
    ErrorReason.ERROR_REASON_RESOURCE_NOT_FOUND: grpc.StatusCode.NOT_FOUND,
    ErrorReason.ERROR_REASON_RESOURCE_EXISTS: grpc.StatusCode.ALREADY_EXISTS,
    ErrorReason.ERROR_REASON_RESOURCE_IN_USE: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_WRONG_STATE: grpc.StatusCode.FAILED_PRECONDITION,
    ErrorReason.ERROR_REASON_CONFLICT: grpc.StatusCode.ABORTED,
    ErrorReason.ERROR_REASON_LEASE_LOST: grpc.StatusCode.PERMISSION_DENIED,
    ErrorReason.ERROR_REASON_STORAGE_FULL: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.ERROR_REASON_LIMIT_EXCEEDED: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorReason.ERROR_REASON_CORRUPTED: grpc.StatusCode.DATA_LOSS,
    ErrorReason.ERROR_REASON_WRONG_OFFSET: grpc.StatusCode.OUT_OF_RANGE,
    ErrorReason.ERROR_REASON_NOT_READY: grpc.StatusCode.UNAVAILABLE,
    ErrorReason.ERROR_REASON_DEADLINE_EXCEEDED: grpc.StatusCode.DEADLINE_EXCEEDED,
    ErrorReason.ERROR_REASON_INTERNAL: grpc.StatusCode.INTERNAL,
    ErrorReason.ERROR_REASON_UNIMPLEMENTED: grpc.StatusCode.UNIMPLEMENTED,
}


def to_status(error: BaseException, request_id: str) -> tuple[grpc.StatusCode, status_pb2.Status]:
    """What the caller is told of an error.

    An error that is not a `PenstockError` tells a stranger nothing but the request id; the log has the rest under it.
    """
    known = error if isinstance(error, PenstockError) else PenstockError(f"Internal error in request {request_id}.")
    code = CODES[known.reason]
    reason = ErrorReason.Name(known.reason).removeprefix("ERROR_REASON_")
    metadata = {key: _clipped(value, _METADATA_BYTES) for key, value in known.metadata.items()}
    metadata["request_id"] = request_id
    details: list[message.Message] = [error_details_pb2.ErrorInfo(reason=reason, domain=DOMAIN, metadata=metadata)]
    if isinstance(known, InvalidFieldError):
        details.append(_bad_request(known.violations))
    text = _clipped(known.message, _MESSAGE_BYTES)
    return code, status_pb2.Status(code=code.value[0], message=text, details=[_packed(d) for d in details])


def from_status(text: str, serialized: bytes) -> PenstockError:
    """The error that `to_status` made this of, in another process, to be raised in this one. `text` is what it says."""
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status_pb2.Status.FromString(serialized).details:
        for known in (info, bad):
            detail.Unpack(known)
    violations = [Violation(one.field, one.description) for one in bad.field_violations]
    error = InvalidFieldError(violations) if violations else PenstockError(text)
    error.message, error.metadata = text, dict(info.metadata)
    error.reason = ErrorReason.Value(f"ERROR_REASON_{info.reason}")
    return error


def _bad_request(violations: Sequence[Violation]) -> error_details_pb2.BadRequest:
    """As many violations as fit, and at least one."""
    bad = error_details_pb2.BadRequest()
    for number, violation in enumerate(violations):
        field = _clipped(violation.field, _METADATA_BYTES)
        bad.field_violations.add(field=field, description=_clipped(violation.description, _MESSAGE_BYTES))
        if number and bad.ByteSize() > _VIOLATIONS_BYTES:
            del bad.field_violations[number]
            break
    return bad


def _clipped(text: str, limit: int) -> str:
    """The text in at most `limit` bytes of UTF-8, always encodable."""
    data = text.encode(errors="replace")
    return data.decode() if len(data) <= limit else data[: limit - 3].decode(errors="ignore") + "…"


def _packed(detail: message.Message) -> any_pb2.Any:
    packed = any_pb2.Any()
    packed.Pack(detail)
    return packed
