"""What the first runs of an engine cost, and what they show."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.integration.inference import graphs

from penstock.inference import warm_up
from penstock.inference.engine import Stop
from penstock.inference.onnx_engine import OnnxEngine, SessionPlan
from penstock.inference.signature import Signature
from penstock.inference.tensors import Array

ROW = {"rows": np.ones((1, graphs.FEATURES), np.float32)}


class Paced(OnnxEngine):
    """An engine whose runs take so many milliseconds of its own clock, one after the other; notes their rows."""

    def __init__(self, folder: Path, *taken_ms: int) -> None:
        model = folder / "model.onnx"
        model.write_bytes(graphs.scale(2).files["model.onnx"])
        super().__init__(model, SessionPlan(1, ("CPUExecutionProvider",)))
        self._taken_ms = list(taken_ms)
        self.now_ns = 0
        self.rows: list[int] = []

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None) -> list[Array]:
        self.rows.append(len(inputs["rows"]))
        self.now_ns += self._taken_ms.pop(0) * 1_000_000
        return super().run(inputs, outputs, stop)


def rows_for_the_loop(monkeypatch: pytest.MonkeyPatch, engine: Paced, threshold_us: int) -> int:
    monkeypatch.setattr(warm_up, "perf_counter_ns", lambda: engine.now_ns)
    return warm_up.loop_rows(engine, Signature.of(graphs.scale(2).signature), ROW, 4, threshold_us, engine.stopper())


@pytest.mark.parametrize(
    ("taken_ms", "fitting", "runs"),
    [
        ([1, 1, 1], 4, [1, 2, 4]),
        ([25, 1, 1, 1], 4, [1, 1, 2, 4]),
        ([3, 3, 1, 1, 1], 4, [1, 1, 1, 2, 4]),
        ([3, 3, 3], 0, [1, 1, 1]),
        ([25, 25], 0, [1, 1]),
        ([1, 25, 25], 1, [1, 2, 2]),
    ],
    ids=[
        "short",
        "a pause of the machine",
        "two pauses",
        "above the threshold",
        "far above it",
        "two rows are too many",
    ],
)
def test_rows_for_the_loop_are_found_in_few_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, taken_ms: list[int], fitting: int, runs: list[int]
) -> None:
    engine = Paced(tmp_path, *taken_ms)
    assert rows_for_the_loop(monkeypatch, engine, 2_000) == fitting
    assert engine.rows == runs


def test_no_run_is_made_for_a_threshold_of_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    engine = Paced(tmp_path)
    assert rows_for_the_loop(monkeypatch, engine, 0) == 0
    assert engine.rows == []
