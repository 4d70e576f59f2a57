"""Rows made hard, and a source in whose answers they show."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from penstock.converters import GateError
from penstock.converters.parity import Batch, SkippedRows, Tensors, compare
from penstock.converters.probe import probe
from penstock.converters.source import SourceTensor


class Polynomial:
    """x² − 2x in float32, which loses figures where x is large; it fails on the rows that it is told to."""

    name = "polynomial"
    description = "by hand"
    inputs = (SourceTensor("x", "float32", (None, 3)),)
    outputs = (SourceTensor("y", "float32", (None, 3)),)

    def __init__(self, refuses: str = "") -> None:
        self._refuses = refuses

    def answer(self, rows: Tensors) -> dict[str, NDArray[Any]]:
        x = rows["x"]
        if self._refuses == "nan" and np.isnan(x).any():
            raise ValueError("Input X contains NaN.\nImpute it.")
        if self._refuses == "empty" and not len(x):
            raise ValueError
        return {"y": np.nan_to_num(x * x - 2 * x)}

    def random_rows(self, shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, NDArray[Any]]:
        return {"x": np.random.default_rng(seed).standard_normal(shapes["x"]).astype(np.float32)}

    def own_rows(self) -> Mapping[str, Tensors]:
        return {"threshold": {"x": np.ones((4, 3), np.float32)}}


def kinds(source: Polynomial) -> dict[str, Batch]:
    return {batch.rows: batch for batch in probe(source, None).batches}


def test_each_kind_has_what_it_is_called_for() -> None:
    found = kinds(Polynomial())
    assert list(found) == ["random", "extreme", "nan", "threshold", "empty"]
    extreme = found["extreme"].inputs["x"]
    assert {0.0, 1e4, -1e4} <= set(extreme[:, 0].tolist())
    assert np.finfo(np.float32).tiny < np.abs(extreme[3]).max() < 1e-36
    assert np.isnan(found["nan"].inputs["x"]).sum(axis=1).tolist() == [1, 1, 1, 1, 1, 1, 3]
    assert found["threshold"].size == 4
    assert found["empty"].size == 0


@pytest.mark.parametrize(("refuses", "reason"), [("nan", "Input X contains NaN."), ("empty", "ValueError.")])
def test_what_the_source_fails_on_is_left_out_with_its_reason(refuses: str, reason: str) -> None:
    asked = probe(Polynomial(refuses), None)
    assert asked.skipped == (SkippedRows(refuses, f"the source fails on them: {reason}"),)
    assert refuses not in {batch.rows for batch in asked.batches}


def test_rounding_is_forgiven_on_extreme_rows_and_errors_are_not() -> None:
    extreme = kinds(Polynomial())["extreme"]
    x = extreme.inputs["x"]
    otherwise = x * (x - np.float32(2))
    compare(extreme, "y", otherwise, None)
    with pytest.raises(GateError, match="extreme rows"):
        compare(extreme, "y", otherwise * np.float32(1.01), None)
    rounded = Batch("sample", len(x), extreme.inputs, extreme.answers)
    assert compare(rounded, "y", otherwise, None).max_absolute_error > 0
