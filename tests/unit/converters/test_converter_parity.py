from typing import Any

import numpy as np
import pytest
from numpy.typing import ArrayLike, NDArray

from penstock.converters import GateError, ParityReport, Tolerance
from penstock.converters.parity import Batch, DatatypeTolerance, compare

NAN, INF = float("nan"), float("inf")


def batch(answer: ArrayLike) -> Batch:
    array = np.asarray(answer, np.float32)
    return Batch("random", len(array), {}, {"y": array})


def test_errors_are_measured() -> None:
    case = compare(
        batch([[1.0, 2.0], [4.0, 3.0]]),
        "y",
        np.asarray([[1.5, 2.0], [4.0, 5.0]], np.float32),
        Tolerance(absolute=1.0, relative=1.0),
    )
    assert case.max_absolute_error == pytest.approx(2.0)
    assert case.max_relative_error == pytest.approx(2 / 3)
    assert case.argmax_agreement == pytest.approx(0.5)


def test_small_sources_count_absolutely_only() -> None:
    case = compare(batch([[1e-6, 1.0]]), "y", np.asarray([[3e-6, 1.0]], np.float32), Tolerance())
    assert case.max_absolute_error == pytest.approx(2e-6)
    assert case.max_relative_error == 0.0


@pytest.mark.parametrize(
    ("source", "converted", "passes"),
    [
        ([1.0], [1.00005], True),
        ([1.0], [1.01], False),
        ([NAN], [NAN], True),
        ([1.0], [NAN], False),
        ([NAN], [1.0], False),
        ([INF], [INF], True),
        ([INF], [-INF], False),
        ([INF], [1.0], False),
        ([1.0], [INF], False),
    ],
)
def test_element(source: list[float], converted: list[float], passes: bool) -> None:
    arguments = batch([source]), "y", np.asarray([converted], np.float32), Tolerance()
    if passes:
        assert compare(*arguments).max_absolute_error < 1e-4
    else:
        with pytest.raises(GateError):
            compare(*arguments)


def test_an_element_may_differ_by_what_is_little_beside_its_row() -> None:
    source, converted = [[30.0, 0.0], [1.0, 0.0]], [[30.0, 2e-4], [1.0, 0.0]]
    assert compare(batch(source), "y", np.asarray(converted, np.float32), Tolerance()).max_absolute_error > 1e-4
    with pytest.raises(GateError, match="row 1"):
        compare(batch(source), "y", np.asarray([[30.0, 0.0], [1.0, 2e-4]], np.float32), Tolerance())


def test_failure_names_output_row_and_difference() -> None:
    source = np.zeros((7, 3), np.float32)
    converted = source.copy()
    converted[2, 0], converted[5, 1] = 0.25, 0.5
    with pytest.raises(GateError, match=r"'y'.*row 5, element \[1\].*2 of 21") as caught:
        compare(batch(source), "y", converted, Tolerance())
    assert (caught.value.output, caught.value.row, caught.value.difference) == ("y", 5, 0.5)


@pytest.mark.parametrize("converted", [np.zeros((1, 3), np.float32), np.zeros((1, 2), np.float64)])
def test_other_shape_or_type_fails(converted: NDArray[Any]) -> None:
    with pytest.raises(GateError, match="the source gives float32"):
        compare(batch([[0.0, 0.0]]), "y", converted, Tolerance())


def test_report_is_the_worst_of_its_cases() -> None:
    tolerance = Tolerance(absolute=1.0, relative=1.0)
    cases = [
        compare(batch([[1.0, 2.0]]), "y", np.asarray([[1.0 + error, 2.0]], np.float32), tolerance)
        for error in (0.25, 0.5)
    ]
    report = ParityReport.of(cases, {"FP32": tolerance}, source="keras", runtime="onnxruntime")
    assert report.max_absolute_error == 0.5
    assert report.max_relative_error == 0.5
    assert report.cases == tuple(cases)
    assert report.tolerances == (DatatypeTolerance("FP32", 1.0, 1.0),)
    assert report.row_count == 2
    assert report.argmax_agreement == 1.0


def test_each_datatype_has_its_tolerance() -> None:
    for dtype, passes in (("float16", True), ("float32", False)):
        source, converted = np.asarray([[1.0]], dtype), np.asarray([[1.005]], dtype)
        rows = Batch("random", 1, {}, {"y": source})
        if passes:
            compare(rows, "y", converted, None)
        else:
            with pytest.raises(GateError, match="row 0"):
                compare(rows, "y", converted, None)


@pytest.mark.parametrize(
    ("source", "converted"),
    [
        (np.asarray([[1_000_000]], np.int64), np.asarray([[1_000_001]], np.int64)),
        (np.asarray([[True]]), np.asarray([[False]])),
        (np.asarray([["cat"]], object), np.asarray([["dog"]], object)),
    ],
)
def test_classes_and_texts_are_equal_or_wrong(source: NDArray[Any], converted: NDArray[Any]) -> None:
    rows = Batch("random", 1, {}, {"y": source})
    assert compare(rows, "y", source, None).max_absolute_error == 0.0
    with pytest.raises(GateError, match=r"'y' differs.*row 0") as caught:
        compare(rows, "y", converted, Tolerance(10, 10))
    assert (caught.value.output, caught.value.row) == ("y", 0)


def test_slack_is_allowed_where_it_was_measured() -> None:
    source, slack = np.asarray([[1.0], [1.0]], np.float32), np.asarray([[0.5], [0.0]])
    rows = Batch("extreme", 2, {}, {"y": source}, slack={"y": slack})
    assert compare(rows, "y", np.asarray([[1.4], [1.0]], np.float32), None).max_absolute_error == pytest.approx(0.4)
    with pytest.raises(GateError, match="row 1"):
        compare(rows, "y", np.asarray([[1.4], [1.4]], np.float32), None)


@pytest.mark.parametrize("value", [-1.0, NAN, INF])
def test_tolerance_is_a_bound(value: float) -> None:
    with pytest.raises(ValueError, match="tolerance must be"):
        Tolerance(absolute=value)
