"""Asks the source model: its answers to random, hard and given rows, and from their shapes its signature."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penstock.converters.errors import UnsupportedModelError, said_by
from penstock.converters.parity import Batch, SkippedRows, Tensors, Tolerance, tolerance_of
from penstock.converters.rows import hard_batches
from penstock.converters.signature import Signature, TensorSpec
from penstock.converters.source import (
    NamedShape,
    Source,
    SourceTensor,
    axis_names,
    datatype_of,
    fitted_samples,
    precision_of,
    undecided,
)

BATCH_SIZES = (1, 2, 7, 32)
HARDENED = BATCH_SIZES.index(7)
"""The random batch of which hard rows are made."""
SAMPLE_BATCH_SIZE = 256

# Sizes tried for dynamic axes: a first one, and how far the next is; large enough for some convolutions and poolings.
_STEPS_TRIED = (16, 5)
_PIXELS_TRIED = (64, 9)

_SHARES: tuple[Literal["none", "meaning", "all"], ...] = ("none", "meaning", "all")
"""What dynamic axes may have one size, from the most freedom to the least."""


@dataclass(frozen=True)
class Examination:
    """What a model takes and gives, what it answered, and the kinds of rows that it was not asked.

    `tolerance` is the model's own, if that is not its datatypes'.
    """

    signature: Signature
    batches: tuple[Batch, ...]
    skipped: tuple[SkippedRows, ...]
    tolerance: Tolerance | None = None


def probe(source: Source, samples: Mapping[str, NDArray[Any]] | None) -> Examination:
    """The model's signature, and batches of 1, 2, 7 and 32 random rows, of hard ones and of the samples, with answers.

    A dynamic axis of an output has the name of the input axis whose size it had in every random batch, else its own.
    Raises `InvalidSamplesError`, and `UnsupportedModelError` if the model itself fails on random rows.
    """
    sample_batches = list(_sample_batches(source, samples)) if samples is not None else []
    shapes, batches = _random_batches(source)
    inputs = tuple(TensorSpec(tensor.name, tensor.datatype, shapes[tensor.name]) for tensor in source.inputs)
    sizes = [_axis_sizes(shapes, batch) for batch in batches]
    outputs = []
    for tensor in source.outputs:
        answers = [batch.answers[tensor.name] for batch in batches]
        shape = _output_shape(tensor, [answer.shape for answer in answers], sizes)
        outputs.append(TensorSpec(tensor.name, datatype_of(answers[0]), shape))
    hard = list(hard_batches(source, shapes, batches[HARDENED]))
    asked = [batch for batch in hard if isinstance(batch, Batch)]
    skipped = [kind for kind in hard if isinstance(kind, SkippedRows)]
    return Examination(
        Signature(inputs, tuple(outputs)),
        (*batches, *asked, *sample_batches),
        tuple(skipped),
        tolerance_of(np.dtype(np.float16), None) if precision_of(source.outputs) == "float16" else None,
    )


def _random_batches(source: Source) -> tuple[dict[str, NamedShape], list[Batch]]:
    """The shapes with the most freedom that the model takes.

    A text and its mask, say, go together in no size but the same; a mask of attention is as wide as it is high.
    """
    namings = [axis_names(source.inputs, share) for share in _SHARES]
    *freer, last = (shapes for index, shapes in enumerate(namings) if shapes not in namings[:index])
    for shapes in freer:
        try:
            return shapes, _batches_of(source, shapes)
        except Exception:  # noqa: S112 a model raises what it likes; it may take less
            continue
    try:
        return last, _batches_of(source, last)
    except Exception as error:  # a model raises what it likes
        raise _failing(source, error) from error


def _batches_of(source: Source, shapes: dict[str, NamedShape]) -> list[Batch]:
    return [_random_batch(source, shapes, trial) for trial in range(len(BATCH_SIZES))]


def _random_batch(source: Source, shapes: dict[str, NamedShape], trial: int) -> Batch:
    # Rows come along the first axis, whatever it is called; what differs in name may differ in size.
    sizes: dict[str, int] = {
        axis: BATCH_SIZES[trial] for shape in shapes.values() for axis in shape[:1] if isinstance(axis, str)
    }
    rows_axes = len(sizes)
    # Three sizes tell axes apart; 32 rows have the smallest again.
    for shape in shapes.values():
        first, step = _STEPS_TRIED if len(shape) < 4 else _PIXELS_TRIED
        for axis in shape:
            if isinstance(axis, str) and axis not in sizes:
                sizes[axis] = first + step * (trial % 3) + len(sizes) - rows_axes
    drawn = {name: [axis if isinstance(axis, int) else sizes[axis] for axis in shape] for name, shape in shapes.items()}
    rows = source.random_rows(drawn, seed=trial)
    size = min(array.shape[0] if array.ndim else 1 for array in rows.values())
    return _batch(source, "random", size, rows)


def _batch(source: Source, kind: str, size: int, rows: Tensors) -> Batch:
    answers = source.answer(rows)
    return Batch(kind, size, rows, answers, unasked=undecided(source.outputs, answers))


def _output_shape(
    tensor: SourceTensor, observed: Sequence[tuple[int, ...]], sizes: Sequence[dict[str, int]]
) -> NamedShape:
    """Some layers of Keras declare another rank, size or datatype than their answers have: the answers count."""
    declared = tensor.shape if len(tensor.shape) == len(observed[0]) else (None, *observed[0][1:])
    return tuple(
        size
        if isinstance(size, str)
        else observed[0][axis]
        if isinstance(size, int)
        else _followed(axis, observed, sizes) or f"{tensor.name}_axis_{axis}"
        for axis, size in enumerate(declared)
    )


def _sample_batches(source: Source, samples: Mapping[str, NDArray[Any]]) -> Iterator[Batch]:
    count, rows = fitted_samples(source.inputs, samples)
    for start in range(0, count, SAMPLE_BATCH_SIZE):
        part = {name: array[start : start + SAMPLE_BATCH_SIZE] for name, array in rows.items()}
        try:
            yield _batch(source, "sample", min(SAMPLE_BATCH_SIZE, count - start), part)
        except Exception as error:  # a model raises what it likes
            raise _failing(source, error) from error


def _failing(source: Source, error: Exception) -> UnsupportedModelError:
    inputs = ", ".join(f"{tensor.name} {tensor.dtype} {list(tensor.shape)}" for tensor in source.inputs)
    return UnsupportedModelError(
        f"The model itself, in {source.description}, fails on rows of its input shapes ({inputs}): {said_by(error)} "
        "Fix the model, or give its inputs the sizes that it needs."
    )


def _axis_sizes(shapes: dict[str, NamedShape], batch: Batch) -> dict[str, int]:
    return {
        axis: size
        for name, shape in shapes.items()
        for axis, size in zip(shape, batch.inputs[name].shape, strict=True)
        if isinstance(axis, str)
    }


def _followed(axis: int, observed: Sequence[tuple[int, ...]], sizes: Sequence[dict[str, int]]) -> str | None:
    for name in sizes[0]:
        if all(shape[axis] == known[name] for shape, known in zip(observed, sizes, strict=True)):
            return name
    return None
