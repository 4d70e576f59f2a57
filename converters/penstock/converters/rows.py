"""Rows on which converted models differ from their sources first: extreme ones, NaN, none, padding, unknown words."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.converters.errors import said_by
from penstock.converters.parity import Batch, SkippedRows, Tensors
from penstock.converters.source import TEXT, NamedShape, Source, SourceTensor, precision_of, undecided

# Far outside of what models are trained on, and yet no sum of many squares overflows.
_LARGE = {"float16": 64.0, "float32": 1e4}
# Almost nothing, but normal numbers: TensorFlow takes smaller ones of float32 for zero.
_TINY = {"float16": 1e-4, "float32": 1e-37}

_INTEGERS = (-1, 7, -100, 1000, 2**24 + 1, -(2**24) - 3)
"""Below zero, above what a vocabulary or a number of classes mostly is, and odd ones that float32 has not."""

_WIGGLE = {"float16": 2.0**-7, "float32": 2.0**-20}
"""Extreme rows are also asked a few roundings beside themselves: what their answers change by is slack."""
_WIGGLES = 2
_LARGE_KINDS = {"extreme": "f", "integers": "iu"}
"""The kinds of rows with large numbers, and the kinds of numpy's datatypes that these are of."""
_SLACK_FACTOR = 8.0
_ROUNDING = {"float16": 2.0**-7, "float32": 2.0**-16}
"""What may be lost of the largest number of a row: about what the tolerance is to numbers of one."""

_UNKNOWN_TEXTS = ("", " ", "zyzzyva", "Straße", "日本語", "☂ unseen, UNSEEN!", "a" * 300)


def hard_batches(source: Source, shapes: Mapping[str, NamedShape], base: Batch) -> Iterator[Batch | SkippedRows]:
    """`base` made hard in one way after the other, each with the source's answers, or why it was left out."""
    made = {
        "extreme": _extreme(source, base.inputs),
        "nan": _nan(source, base.inputs),
        "integers": _integers(source, base.inputs),
        "padded": _padded(source, shapes, base.inputs),
        "unknown": _unknown(source, base.inputs),
        **source.own_rows(),
    }
    for kind, rows in made.items():
        if rows is None:
            continue
        batch = _asked(source, kind, rows, base)
        if kind in _LARGE_KINDS and isinstance(batch, Batch):
            batch = _with_slack(source, batch)
        yield batch
    if all(shape and isinstance(shape[0], str) for shape in shapes.values()):
        yield _asked(source, "empty", {name: array[:0] for name, array in base.inputs.items()}, base)


def _asked(source: Source, kind: str, rows: Tensors, base: Batch) -> Batch | SkippedRows:
    size = min(array.shape[0] if array.ndim else 1 for array in rows.values())
    try:
        answers = source.answer(rows)
    except Exception as error:  # a model raises what it likes
        return SkippedRows(kind, f"the source fails on them: {said_by(error)}")
    if not size and not all(
        tensor.fits(answers[tensor.name]) and _is_part(answers[tensor.name].shape, base.answers[tensor.name].shape)
        for tensor in source.outputs
    ):
        return SkippedRows(kind, "the source answers in another shape than otherwise")
    is_strange = kind in {"nan", "empty"} or kind in _LARGE_KINDS
    unasked = {name: ~_is_number(array) for name, array in answers.items()} if is_strange else {}
    if any(mask.any() for mask in unasked.values()) and all(mask.all() for mask in unasked.values()):
        return SkippedRows(kind, "the source answers with no number")
    for name, mask in undecided(source.outputs, answers).items():
        unasked[name] = mask | unasked.get(name, False)
    return Batch(kind, size, rows, answers, unasked=unasked)


def _with_slack(source: Source, batch: Batch) -> Batch:
    """Rounding is enlarged by such rows as by the model itself, and no conversion can keep the order of all sums."""
    random, kinds = np.random.default_rng(0), _LARGE_KINDS[batch.rows]
    precision = precision_of((*source.inputs, *source.outputs))
    slack = {name: _rounding(batch, array, precision) for name, array in batch.answers.items() if array.dtype != object}
    unasked = dict(batch.unasked)
    for _ in range(_WIGGLES):
        rows = {
            name: _moved(array, _WIGGLE[precision], random) if array.dtype.kind in kinds else array
            for name, array in batch.inputs.items()
        }
        answers = source.answer(rows)
        for name, known in slack.items():
            if batch.rows == "integers" and answers[name].dtype.kind != "f":
                continue  # what is made of integers alone is exact
            ours, theirs = answers[name].astype(np.float64), batch.answers[name].astype(np.float64)
            with np.errstate(invalid="ignore"):
                moved = np.nan_to_num(np.abs(ours - theirs), nan=0.0)
            slack[name] = np.maximum(known, _SLACK_FACTOR * (_shared(moved) if batch.rows == "extreme" else moved))
            unasked[name] = unasked[name] | ~_is_number(answers[name])
    return Batch(batch.rows, batch.size, batch.inputs, batch.answers, slack, unasked)


def _shared(moved: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of a softmax of equal numbers, one after the other may be the largest: what one moves by, each may."""
    if moved.ndim < 2 or not moved.size:
        return moved
    shared: NDArray[np.float64] = np.broadcast_to(moved.max(axis=-1, keepdims=True), moved.shape)
    return shared


def _moved(array: NDArray[Any], wiggle: float, random: np.random.Generator) -> NDArray[Any]:
    """A few roundings beside; integers not further from zero than they are, where the source may not take them."""
    moved: NDArray[Any]
    if array.dtype.kind == "f":
        moved = array * (1 + wiggle * random.choice([-1, 1], array.shape)).astype(array.dtype)
    else:
        moved = array - (array * wiggle).astype(array.dtype) * random.integers(0, 2, array.shape, array.dtype)
    return moved


def _rounding(batch: Batch, answer: NDArray[Any], precision: str) -> NDArray[np.float64]:
    """What is lost where an answer is the difference of numbers as large as those of its row."""
    numbers = [
        array.reshape(len(array), -1) for array in batch.inputs.values() if array.ndim and array.dtype.kind == "f"
    ]
    if batch.rows != "extreme" or answer.ndim == 0 or any(len(array) != len(answer) for array in numbers):
        return np.zeros(answer.shape)
    largest = np.max([np.abs(array).max(axis=1, initial=0) for array in numbers], axis=0)
    lost = _ROUNDING[precision] * largest.astype(np.float64)
    return np.broadcast_to(lost.reshape(-1, *[1] * (answer.ndim - 1)), answer.shape).copy()


def _extreme(source: Source, base: Tensors) -> Tensors | None:
    """Rows of zeros, of large and of tiny numbers of either sign, and of random ones made large."""
    if not _floats(source):
        return None
    rows = dict(base)
    precision = precision_of((*source.inputs, *source.outputs))
    for tensor in _floats(source):
        array, large, tiny = base[tensor.name].copy(), _LARGE[precision], _TINY[precision]
        fills = (0.0, large, -large, tiny, -tiny)
        for row, fill in enumerate(fills[: len(array)]):
            array[row] = fill
        array[len(fills) :] *= large
        rows[tensor.name] = array
    return rows


def _nan(source: Source, base: Tensors) -> Tensors | None:
    """Rows with one NaN in another place each, and a last one of nothing else."""
    if not _floats(source):
        return None
    rows = dict(base)
    for tensor in _floats(source):
        array = base[tensor.name].copy()
        if array.size:
            flat = array.reshape(len(array), -1)
            for row in range(len(flat)):
                flat[row, row % flat.shape[1]] = np.nan
            flat[-1] = np.nan
            array = flat.reshape(array.shape)
        rows[tensor.name] = array
    return rows


def _integers(source: Source, base: Tensors) -> Tensors | None:
    """Integers of any size and sign in those inputs in which the source takes them; in all, if it takes none."""
    wide = {}
    random = np.random.default_rng(0)
    for tensor in source.inputs:
        if tensor.numpy_dtype.kind in "iu":
            limits, shape = np.iinfo(tensor.numpy_dtype), base[tensor.name].shape
            integers = np.resize(np.clip(_INTEGERS, limits.min, limits.max), shape).ravel()
            random.shuffle(integers)
            wide[tensor.name] = integers.reshape(shape).astype(tensor.dtype)
    taken = {name: array for name, array in wide.items() if _takes(source, {**base, name: array})}
    return {**base, **(taken or wide)} if wide else None


def _takes(source: Source, rows: Tensors) -> bool:
    try:
        source.answer(rows)
    except Exception:  # a model raises what it likes
        return False
    return True


def _padded(source: Source, shapes: Mapping[str, NamedShape], base: Tensors) -> Tensors | None:
    """Sequences that end earlier from row to row, with zeros behind; the first has nothing but them."""
    padded = [
        tensor
        for tensor in source.inputs
        if len(shapes[tensor.name]) > 1
        and tensor.dtype != TEXT
        and (isinstance(shapes[tensor.name][1], str) or (np.dtype(tensor.dtype).kind in "iu"))
    ]
    if not padded:
        return None
    rows = dict(base)
    for tensor in padded:
        array = base[tensor.name].copy()
        for row in range(len(array)):
            array[row, row * array.shape[1] // len(array) :] = 0
        rows[tensor.name] = array
    return rows


def _unknown(source: Source, base: Tensors) -> Tensors | None:
    """Texts that no vocabulary has. Integers stay within what the source says it takes: embeddings have no others."""
    texts = [tensor.name for tensor in source.inputs if tensor.dtype == TEXT]
    if not texts:
        return None
    random = np.random.default_rng(0)
    return {**base, **{name: random.choice(np.asarray(_UNKNOWN_TEXTS, object), base[name].shape) for name in texts}}


def _floats(source: Source) -> list[SourceTensor]:
    return [tensor for tensor in source.inputs if tensor.dtype.startswith("float") and tensor.shape]


def _is_part(shape: tuple[int, ...], whole: tuple[int, ...]) -> bool:
    """Whether an answer to no rows is as wide as one to some. TensorFlow's convolutions may lose the padding."""
    return len(shape) == len(whole) and all(size in {0, known} for size, known in zip(shape, whole, strict=True))


def _is_number(array: NDArray[Any]) -> NDArray[np.bool_]:
    """The lowest number of a datatype is none: a maximum over nothing but NaN is left with it."""
    if array.dtype.kind != "f":
        return np.ones(array.shape, np.bool_)
    numbers: NDArray[np.bool_] = np.abs(array) < np.finfo(array.dtype).max  # false for NaN, too
    return numbers
