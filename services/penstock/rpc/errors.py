"""Errors of the domain. They know no transport; `penstock.rpc.status` says what each becomes on the wire."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.api.types.v1.error_reason_pb2 import ErrorReason


@dataclass(frozen=True)
class Violation:
    """One field that is wrong: its path in the request (`spec.mlp.hidden_units[2]`) and what was expected and came."""

    field: str
    description: str


class PenstockError(Exception):
    """An error that may be shown to the caller: it names the thing, what was expected, what came and what to do."""

    # An instance has one of its own where another process raised the error.
    reason: "ErrorReason.ValueType" = ErrorReason.ERROR_REASON_INTERNAL

    def __init__(self, message: str, **metadata: str) -> None:
        super().__init__(message)
        self.message = message
        self.metadata: Mapping[str, str] = metadata


class InvalidFieldError(PenstockError):
    """The request itself is wrong, wherever it is sent."""

    reason = ErrorReason.ERROR_REASON_INVALID_FIELD

    def __init__(self, violations: Sequence[Violation]) -> None:
        super().__init__("; ".join(f"{violation.field}: {violation.description}" for violation in violations))
        self.violations = tuple(violations)

    @classmethod
    def of(cls, field: str, description: str) -> "InvalidFieldError":
        return cls([Violation(field, description)])


class NotFoundError(PenstockError):
    """There is no such resource."""

    reason = ErrorReason.ERROR_REASON_RESOURCE_NOT_FOUND

    def __init__(self, resource_type: str, resource_name: str, remedy: str = "") -> None:
        message = f"There is no {resource_type} {resource_name!r}." + (f" {remedy}" if remedy else "")
        super().__init__(message, resource_type=resource_type, resource_name=resource_name)


class ExistsError(PenstockError):
    """Something else stands under the name."""

    reason = ErrorReason.ERROR_REASON_RESOURCE_EXISTS


class InUseError(PenstockError):
    """Something else still uses what was to be removed."""

    reason = ErrorReason.ERROR_REASON_RESOURCE_IN_USE


class WrongStateError(PenstockError):
    """The resource's state does not allow the call."""

    reason = ErrorReason.ERROR_REASON_WRONG_STATE


class ConflictError(PenstockError):
    """Somebody else changed the resource first."""

    reason = ErrorReason.ERROR_REASON_CONFLICT


class LeaseLostError(PenstockError):
    """The caller's lease has passed to another worker."""

    reason = ErrorReason.ERROR_REASON_LEASE_LOST


class StorageFullError(PenstockError):
    """The disk is full."""

    reason = ErrorReason.ERROR_REASON_STORAGE_FULL


class LimitExceededError(PenstockError):
    """A documented limit was passed."""

    reason = ErrorReason.ERROR_REASON_LIMIT_EXCEEDED


class CorruptedError(PenstockError):
    """Stored bytes no longer have their digest."""

    reason = ErrorReason.ERROR_REASON_CORRUPTED


class WrongOffsetError(PenstockError):
    """An upload does not go on where the server stands."""

    reason = ErrorReason.ERROR_REASON_WRONG_OFFSET


class NotReadyError(PenstockError):
    """Not now: starting, shutting down, overloaded, or waiting for another service."""

    reason = ErrorReason.ERROR_REASON_NOT_READY


class DeadlineError(PenstockError):
    """The caller's deadline passed before the work was done."""

    reason = ErrorReason.ERROR_REASON_DEADLINE_EXCEEDED


class UnimplementedError(PenstockError):
    """This server does not offer what was asked."""

    reason = ErrorReason.ERROR_REASON_UNIMPLEMENTED


class StartupError(Exception):
    """A server cannot start. The text says why and what to do; it is for the operator, never for a caller."""
