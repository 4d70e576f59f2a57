"""The ways to run a model, each in a process of its own: threads of one never wait awake for the cores of another."""

import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from tests.benchmarks.converters.graphs import inference
from tests.benchmarks.converters.models import built

THREADS = 2
WINDOW_S = 0.5

# Of this process: what it runs, and how many rows that takes.
_run: Callable[[], Any] | None = None
_rows = 0


def process(prepare: Callable[..., None] | None = None, *arguments: Any) -> ProcessPoolExecutor:
    """A process for one way or one task."""
    return ProcessPoolExecutor(1, get_context("spawn"), prepare, arguments)


def onnx_runtime(graph: Path, rows: Path) -> None:
    """With the options that all graphs are run with."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    values = {session.get_inputs()[0].name: np.load(rows)}
    _ready(lambda: session.run(None, values), len(np.load(rows)))


def tensorflow(name: str, rows: Path) -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    function = inference(built(name))
    values = tf.constant(np.load(rows))
    _ready(lambda: function(values), len(values))


def _ready(run: Callable[[], Any], rows: int) -> None:
    global _run, _rows  # one process, one way
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:THREADS])
    run()
    _run, _rows = run, rows


def rate() -> float:
    """Rows per second of this process's way, over a window."""
    assert _run is not None
    start, runs = perf_counter(), 0
    while perf_counter() - start < WINDOW_S:
        _run()
        runs += 1
    return _rows * runs / (perf_counter() - start)
