"""Bare ONNX Runtime in a process of its own: what no server can beat.

As a program it holds one session and measures on demand: a line of JSON in, `[batch, seconds]`, a line of JSON out,
the seconds of each run.
"""

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tests.benchmarks.harness import ROOT, BenchError, step
from tests.benchmarks.inference.models import Model


class Bare:
    """The process, as the harness sees it."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def runs(self, batch: int, seconds: float) -> list[float]:
        """How long each run on `batch` rows took, in seconds; two runs at least."""
        if self._process.stdin is None or self._process.stdout is None:
            raise BenchError("The process of bare ONNX Runtime has no pipes.")
        self._process.stdin.write(json.dumps([batch, seconds]) + "\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise BenchError("Bare ONNX Runtime ended; its error is above.")
        return json.loads(line)

    def rows_per_second(self, batch: int, seconds: float) -> float:
        taken = self.runs(batch, seconds)
        return batch * len(taken) / sum(taken)

    def best_batch(self, largest: int, seconds: float) -> int:
        """The power of two that answers most rows a second; of equals (within 1 %) the smallest."""
        batches = [1 << power for power in range(largest.bit_length())]
        speeds = dict.fromkeys(batches, 0.0)
        # There and back, the better of both: a slow moment must not hide what the reference can do.
        for batch in (*batches, *reversed(batches)):
            step(f"bare ONNX Runtime: {batch} rows a run")
            speeds[batch] = max(speeds[batch], self.rows_per_second(batch, seconds / 2))
        return min(batch for batch, speed in speeds.items() if speed >= 0.99 * max(speeds.values()))


@contextlib.contextmanager
def bare(model: Model) -> Iterator[Bare]:
    """Starts it on a model, warmed up."""
    row = model.repository.parent / f"{model.name}.npz"
    command = [sys.executable, "-m", "tests.benchmarks.inference.bare", str(model.path), str(row)]
    with subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            session = Bare(process)
            session.runs(1, 0.2)
            yield session
        finally:
            process.terminate()


def main(model: Path, row: Path) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = len(os.sched_getaffinity(0))
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    with np.load(row) as arrays:
        rows = dict(arrays)
    for line in sys.stdin:
        batch, seconds = json.loads(line)
        feeds = {name: np.repeat(array, batch, axis=0) for name, array in rows.items()}
        taken: list[float] = []
        while len(taken) < 2 or sum(taken) < seconds:
            started = time.perf_counter()
            session.run(None, feeds)
            taken.append(time.perf_counter() - started)
        print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
