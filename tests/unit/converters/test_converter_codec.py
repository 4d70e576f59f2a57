"""Results and errors that go from one process to another."""

from math import nan
from pathlib import Path
from typing import Any

import pytest

from penstock.converters import (
    Conversion,
    ConversionError,
    GateError,
    Inspection,
    ParityCase,
    ParityReport,
    Provider,
    Signature,
    TensorSpec,
    Tolerance,
    UnsafeFileError,
)
from penstock.converters.codec import decode, decode_error, encode, encode_error

SIGNATURE = Signature((TensorSpec("x", "FP32", ("batch", 3)),), (TensorSpec("y", "BYTES", ("batch",)),))
REPORT = ParityReport.of(
    [ParityCase("y", "random", 7, 1e-7, 0.1 + 0.2, 1.0)],
    {"FP32": Tolerance()},
    source="keras",
    runtime="onnxruntime",
    warnings=["text"],
)
CONVERSION = Conversion(Path("a/b.onnx"), SIGNATURE, REPORT, 18, 10, 999, "ab", None)
INSPECTION = Inspection(
    path=Path("b.onnx"),
    signature=SIGNATURE,
    operators={"MatMul": 2},
    parameter_count=1,
    size_bytes=2,
    ir_version=10,
    opsets={"ai.onnx": 18},
    producer="",
    metadata={"labels": "a"},
    external_data=("b.data",),
    providers=(Provider("CPU", None), Provider("GPU", "none here")),
)


@pytest.mark.parametrize("value", [CONVERSION, INSPECTION, Tolerance(0, 1e-3)])
def test_dataclasses_come_as_they_were(value: Any) -> None:
    assert decode(type(value), encode(value)) == value


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        (Tolerance, {"absolute": "0", "relative": 0.0}),
        (Signature, {"inputs": [], "outputs": [{"name": "y", "datatype": "FP32", "shape": [1.5]}]}),
        (Path | None, 3),
    ],
)
def test_what_is_not_of_the_type_is_refused(kind: Any, value: Any) -> None:
    with pytest.raises(TypeError):
        decode(kind, value)


@pytest.mark.parametrize(
    "error",
    [
        ConversionError("plain"),
        UnsafeFileError("memory", "too much"),
        GateError("no", output="y", row=3, difference=0.5),
    ],
)
def test_errors_come_as_they_were(error: ConversionError) -> None:
    came = decode_error(encode_error(error))
    assert (type(came), str(came), vars(came)) == (type(error), str(error), vars(error))


def test_a_difference_may_be_no_number() -> None:
    came = decode_error(encode_error(GateError("no", difference=nan)))
    assert isinstance(came, GateError)
    assert came.difference != came.difference


def test_no_class_but_our_errors_is_made() -> None:
    with pytest.raises((TypeError, AttributeError)):
        decode_error(encode_error(ConversionError("x")) | {"class": "__doc__"})
