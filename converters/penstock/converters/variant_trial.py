"""Tries the forms of a converted graph on this machine: how accurate, how fast, how large."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from penstock.converters import gate
from penstock.converters.errors import ConversionError
from penstock.converters.parity import Batch, Tensors
from penstock.converters.probe import Examination
from penstock.converters.quantization import quantize
from penstock.converters.runtime import CPU, Runtime, RuntimeDeathError, RuntimeRefusalError
from penstock.converters.variants import (
    FP32,
    AccuracyBound,
    Form,
    Variant,
    VariantError,
    VariantMeasurement,
    VariantReport,
    fastest,
    judged,
)
from penstock.converters.writing import write

TIMED_ROWS = 32
"""Of the larger batch; the smaller one has one row."""
_FEWEST_ROUNDS, _MOST_ROUNDS = 7, 200
_TIMING_SECONDS = 1.5
"""For each variant and size of batch, unless the fewest rounds take longer."""
_SUM_ERROR = 1e-3
"""What the sum of probabilities may differ from 1 by: they are float16, at worst."""


def try_variants(
    graph: onnx.ModelProto,
    asked: Examination,
    forms: Sequence[Form],
    bound: AccuracyBound,
    folder: Path,
    *,
    auto: bool,
) -> VariantReport:
    """Makes the forms of a graph that passed the gate, and measures them beside it. Without `auto`, fp32 is chosen.

    Each is written to the folder, where `load_variant` finds it. Accuracy is measured on the samples if there are
    any, else on the random rows, never on the hard ones: nobody's rows are like them, and 8 bits hold no extremes.
    Latency is measured on a row and a batch of the same rows, in turns, so that what else the machine does slows all
    alike.
    """
    batches = _typical_batches(asked)
    rows = _joined(batches) if batches[0].rows == "sample" else None
    failures: dict[str, str] = {}
    errors: dict[str, tuple[VariantError, ...]] = {}
    sizes: dict[str, int] = {}
    for form in (None, *forms):
        name = form or FP32
        try:
            model = quantize(graph, form, rows=rows) if form else graph
            sizes[name] = write(_file(folder, name), model).size_bytes
            gate.check_form(model, asked.signature, _file(folder, name))
            errors[name] = _errors(_file(folder, name), batches)
        except ConversionError as error:
            failures[name] = f"not possible: {error}"
    small, large = _timed_rows(asked, batches)
    paths = {name: _file(folder, name) for name in errors}
    row_latencies, batch_latencies = (_latencies(paths, rows) for rows in (small, large))
    variants = [
        Variant(name, None, failures[name])
        if name in failures
        else Variant(name, VariantMeasurement(errors[name], row_latencies[name], batch_latencies[name], sizes[name]))
        for name in (FP32, *forms)
    ]
    table = judged(variants, bound)
    return VariantReport(
        variants=table,
        chosen=fastest(table) if auto else FP32,
        row_count=sum(batch.size for batch in batches),
        batch_size=min(len(array) for array in large.values()),
        min_argmax_agreement=bound.argmax_agreement,
        max_relative_error=bound.relative_error,
    )


def load_variant(folder: Path, name: str) -> onnx.ModelProto:
    """A variant that `try_variants` made in the folder."""
    return onnx.load(_file(folder, name))


def write_variants(folder: Path, report: VariantReport, target: Path) -> dict[str, Path]:
    """Writes the kept variants that were not chosen beside the target, `model.int8.onnx`. Raises `ConversionError`."""
    files = {
        name: target.with_name(f"{target.stem}.{name}{target.suffix}") for name in report.kept if name != report.chosen
    }
    for name, file in files.items():
        write(file, load_variant(folder, name))
    return files


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.onnx"


def _typical_batches(asked: Examination) -> list[Batch]:
    samples = [batch for batch in asked.batches if batch.rows == "sample"]
    return samples or [batch for batch in asked.batches if batch.rows == "random"]


def _joined(batches: Sequence[Batch]) -> Tensors:
    return {name: np.concatenate([batch.inputs[name] for batch in batches]) for name in batches[0].inputs}


def _errors(path: Path, batches: Sequence[Batch]) -> tuple[VariantError, ...]:
    try:
        with Runtime(path) as runtime:
            answers = [runtime.answer(batch.inputs) for batch in batches]
    except (RuntimeRefusalError, RuntimeDeathError) as error:
        raise ConversionError(f"ONNX Runtime cannot run the graph: {error}") from error
    return tuple(
        _error(output, [ours[output] for ours in answers], [batch.answers[output] for batch in batches])
        for output in batches[0].answers
    )


def _error(output: str, ours: Sequence[NDArray[Any]], theirs: Sequence[NDArray[Any]]) -> VariantError:
    if theirs[0].dtype.kind != "f":
        equal = np.concatenate([(mine == source).ravel() for mine, source in zip(ours, theirs, strict=True)])
        return VariantError(output, True, 0.0, 0.0, 0.0, float(equal.mean()) if equal.size else 1.0)
    found, expected = (
        np.concatenate([array.ravel() for array in arrays]).astype(np.float64) for arrays in (ours, theirs)
    )
    asked = np.isfinite(expected)
    if not np.isfinite(found[asked]).all():
        raise ConversionError(f"The output {output!r} has NaN or infinity where the source has a number.")
    difference = np.abs(found[asked] - expected[asked])
    size = np.linalg.norm(expected[asked])
    return VariantError(
        output=output,
        is_classification=all(map(_are_probabilities, theirs)),
        max_absolute_error=float(difference.max(initial=0.0)),
        mean_absolute_error=float(difference.mean()) if difference.size else 0.0,
        relative_error=float(np.linalg.norm(difference) / size) if size else float(difference.any()),
        argmax_agreement=_agreement(ours, theirs),
    )


def _are_probabilities(answers: NDArray[Any]) -> bool:
    if answers.ndim < 2 or answers.shape[-1] < 2:
        return False
    return bool((answers >= 0).all() and (np.abs(answers.sum(axis=-1, dtype=np.float64) - 1) <= _SUM_ERROR).all())


def _agreement(ours: Sequence[NDArray[Any]], theirs: Sequence[NDArray[Any]]) -> float:
    """The share of rows with the same largest element of the last axis; 1 if there is no such axis."""
    if theirs[0].ndim < 2 or not theirs[0].size:
        return 1.0
    same = [(mine.argmax(axis=-1) == source.argmax(axis=-1)).ravel() for mine, source in zip(ours, theirs, strict=True)]
    return float(np.concatenate(same).mean())


def _timed_rows(asked: Examination, batches: Sequence[Batch]) -> tuple[Tensors, Tensors]:
    """One row, and as many as there are up to 32. A model with a fixed number of rows gets that number both times."""
    small = min(batches, key=lambda batch: batch.size)
    large = max(batches, key=lambda batch: batch.size)
    if any(isinstance(axis, int) for spec in asked.signature.inputs for axis in spec.shape[:1]):
        return small.inputs, large.inputs
    return (
        {name: array[:1] for name, array in small.inputs.items()},
        {name: array[:TIMED_ROWS] for name, array in large.inputs.items()},
    )


def _latencies(paths: Mapping[str, Path], rows: Tensors) -> dict[str, float]:
    """Medians in microseconds, of runs that take turns."""
    sessions = {name: _session(path) for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for session in sessions.values():
        session.run(None, rows)
    end = perf_counter() + _TIMING_SECONDS * len(sessions)
    for rounds in range(_MOST_ROUNDS):
        if rounds >= _FEWEST_ROUNDS and perf_counter() > end:
            break
        for name, session in sessions.items():
            start = perf_counter()
            session.run(None, rows)
            times[name].append(perf_counter() - start)
    return {name: median(measured) * 1e6 for name, measured in times.items()}


def _session(path: Path) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    # Threads of one session that wait for work in a loop would take the time of the next session's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(path, options, providers=[CPU])
