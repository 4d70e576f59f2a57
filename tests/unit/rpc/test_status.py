"""The table from reasons to statuses, and the bounds of what is told."""

import grpc
import pytest
from google.protobuf import json_format
from google.rpc import error_details_pb2
from hypothesis import given
from hypothesis import strategies as st

from penstock.api.types.v1 import error_reason_pb2
from penstock.api.types.v1.error_reason_pb2 import ErrorReason
from penstock.rpc import errors
from penstock.rpc.status import CODES, from_status, to_status

# What a peer may refuse by default is more than 8 KiB of metadata.
LIMIT = 8 * 1024


def test_every_reason_has_a_row_and_nothing_else_has() -> None:
    assert set(CODES) == set(ErrorReason.values()) - {ErrorReason.ERROR_REASON_UNSPECIFIED}


def test_every_reason_has_one_error_class() -> None:
    declared = errors.PenstockError.__subclasses__()
    classes = [cls for cls in declared if cls.__module__ == errors.__name__]
    reasons = [cls.reason for cls in classes]
    assert len(reasons) == len(set(reasons))
    assert {*reasons, errors.PenstockError.reason} == set(CODES)


@pytest.mark.parametrize(
    ("reason", "code"),
    [
        ("INVALID_FIELD", "INVALID_ARGUMENT"),
        ("RESOURCE_NOT_FOUND", "NOT_FOUND"),
        ("RESOURCE_EXISTS", "ALREADY_EXISTS"),
        ("RESOURCE_IN_USE", "FAILED_PRECONDITION"),
        ("WRONG_STATE", "FAILED_PRECONDITION"),
        ("CONFLICT", "ABORTED"),
        ("LEASE_LOST", "PERMISSION_DENIED"),
        ("STORAGE_FULL", "RESOURCE_EXHAUSTED"),
        ("LIMIT_EXCEEDED", "RESOURCE_EXHAUSTED"),
        ("CORRUPTED", "DATA_LOSS"),
        ("WRONG_OFFSET", "OUT_OF_RANGE"),
        ("NOT_READY", "UNAVAILABLE"),
        ("DEADLINE_EXCEEDED", "DEADLINE_EXCEEDED"),
        ("INTERNAL", "INTERNAL"),
        ("UNIMPLEMENTED", "UNIMPLEMENTED"),
    ],
)
def test_the_table_is_the_one_the_contract_documents(reason: str, code: str) -> None:
    assert CODES[ErrorReason.Value(f"ERROR_REASON_{reason}")] is grpc.StatusCode[code]
    assert error_reason_pb2.DESCRIPTOR.enum_types_by_name["ErrorReason"].values_by_name[f"ERROR_REASON_{reason}"]


def test_not_found_says_what_is_missing() -> None:
    code, status = to_status(errors.NotFoundError("model", "digits", "Register it first."), "r")
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert code is grpc.StatusCode.NOT_FOUND
    assert status.message == "There is no model 'digits'. Register it first."
    assert dict(info.metadata) == {"resource_type": "model", "resource_name": "digits", "request_id": "r"}


def test_an_unknown_exception_tells_nothing() -> None:
    code, status = to_status(KeyError("secret"), "r-1")
    assert code is grpc.StatusCode.INTERNAL
    assert status.message == "Internal error in request r-1."
    assert b"secret" not in status.SerializeToString()


TEXT = st.text(st.characters(), max_size=40).flatmap(lambda text: st.integers(1, 400).map(lambda times: text * times))


@given(st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=30))
def test_any_violations_fit_and_the_first_is_told(found: list[tuple[str, str]]) -> None:
    code, status = to_status(errors.InvalidFieldError([errors.Violation(*pair) for pair in found]), "r" * 64)
    bad = error_details_pb2.BadRequest()
    assert status.details[1].Unpack(bad)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert 1 <= len(bad.field_violations) <= len(found)
    # Binary metadata grows by a third in base64, and a message's bytes by up to three in percent-encoding.
    assert len(status.SerializeToString()) * 4 / 3 + len(status.message.encode()) * 3 < LIMIT


@given(TEXT, TEXT)
def test_any_text_fits(name: str, remedy: str) -> None:
    _, status = to_status(errors.NotFoundError("model", name, remedy), "r" * 64)
    assert len(status.SerializeToString()) * 4 / 3 + len(status.message.encode()) * 3 < LIMIT


@pytest.mark.parametrize(
    "error",
    [
        *(cls("The text – ü.", key="value") for cls in (errors.WrongStateError, errors.NotReadyError)),
        errors.NotFoundError("model", "digits", "Register it first."),
        errors.InvalidFieldError([errors.Violation("a.b", "expected 1; got 2"), errors.Violation("c", "missing")]),
        ValueError("what only the operator may read"),
    ],
)
def test_an_error_of_another_process_is_told_as_it_was(error: Exception) -> None:
    _, status = to_status(error, "r")
    again = from_status(status.message, status.SerializeToString())
    assert told(again) == told(error)


def told(error: Exception) -> object:
    """As text: the bytes of equal maps may differ in order."""
    code, status = to_status(error, "r")
    return code, json_format.MessageToDict(status)
