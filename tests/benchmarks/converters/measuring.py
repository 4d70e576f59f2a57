"""Measures one model in every way that there is, in the process that calls it."""

import os
import tempfile
from pathlib import Path
from time import perf_counter

import onnx
import onnxruntime
from tests.benchmarks.harness import BenchError, compare, in_turn, step
from tests.benchmarks.report import Aim, Row

from penstock.converters import convert, quantize
from penstock.converters.conversion import _quiet_tensorflow

_quiet_tensorflow()

import keras  # noqa: E402 TensorFlow reads its settings as it is loaded
import tensorflow as tf  # noqa: E402
import tf2onnx  # noqa: E402
from tests.benchmarks.converters import ways  # noqa: E402
from tests.benchmarks.converters.models import SUBJECTS, rows_for  # noqa: E402

PENSTOCK, INT8, STOCK, TENSORFLOW = "Penstock", "Penstock int8", "tf2onnx", "TensorFlow"
PYTORCH = "torch.onnx, optimized"
ROUNDS, WINDOW_S = 5, 1.5
TENSORFLOW_AIM = 1.2


def versions() -> dict[str, str]:
    return {module.__name__: module.__version__ for module in (keras, onnx, onnxruntime, tf, tf2onnx)}


def measure(name: str) -> tuple[list[Row], dict[str, str]]:
    """Runs every way in turn: a row for each pair that is to be compared, and what there is not, with the reason."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: ways.THREADS])
    tf.config.threading.set_intra_op_parallelism_threads(ways.THREADS)
    subject = SUBJECTS[name]
    found: list[Row] = []
    missing: dict[str, str] = {}
    step(f"{name}: building")
    keras.utils.set_random_seed(7)
    model = subject.build()
    rows = rows_for(model, subject.rows)
    with tempfile.TemporaryDirectory() as folder:
        step(f"{name}: converting")
        start = perf_counter()
        convert(model, Path(folder) / "model.onnx")
        seconds = perf_counter() - start
        graph = onnx.load(Path(folder) / "model.onnx")
    runs = {PENSTOCK: ways.onnx_runtime(graph, rows), TENSORFLOW: ways.tensorflow(model, rows)}
    step(f"{name}: the other ways")
    if subject.int8:
        runs[INT8] = ways.onnx_runtime(quantize(graph, subject.int8, rows={graph.graph.input[0].name: rows}), rows)
    try:
        runs[STOCK] = ways.tf2onnx_itself(model, rows)
    except BenchError as error:
        missing[f"{name} beside {STOCK}"] = str(error)
    if subject.pytorch is not None and (run := ways.torch_onnx(rows, causal=subject.pytorch)):
        runs[PYTORCH] = run
    taken = in_turn({way: lambda run=run: rate(run, subject.rows) for way, run in runs.items()}, ROUNDS, name)
    for way, reference, aim in (
        (PENSTOCK, STOCK, subject.fp32_aim),
        (INT8, STOCK, subject.int8_aim),
        (PENSTOCK, PYTORCH, None),
        (PENSTOCK, TENSORFLOW, TENSORFLOW_AIM),
    ):
        if way in runs and reference in runs:
            bound = Aim("ratio", aim, True) if aim else None
            found.append(compare(name, way, "rows/s", taken, way, reference, bound))
    bound = Aim("value", subject.conversion_aim_s, False) if subject.conversion_aim_s else None
    found.append(Row(name, "conversion", "s", seconds, aim=bound))
    return found, missing


def rate(run: ways.Run, rows: int) -> float:
    """Rows per second over a window."""
    start, runs = perf_counter(), 0
    while perf_counter() - start < WINDOW_S:
        run()
        runs += 1
    return rows * runs / (perf_counter() - start)
