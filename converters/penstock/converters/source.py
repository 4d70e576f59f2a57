"""What a conversion asks of a model, whatever made it: named tensors, rows to try, answers, and a graph."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.converters.errors import InvalidSamplesError
from penstock.converters.parity import Tensors
from penstock.converters.signature import BATCH, Signature

# What the dynamic axes of a tensor are called, by its rank. Channels are last: TensorFlow runs nothing else on a CPU.
_AXES = {2: {1: "sequence"}, 3: {1: "sequence"}, 4: {1: "height", 2: "width"}, 5: {1: "depth", 2: "height", 3: "width"}}

TEXT = "string"
"""Keras's name of the datatype of texts. In numpy they are objects, as ONNX Runtime takes and gives them."""

DATATYPES = {
    "bool": "BOOL",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
    TEXT: "BYTES",
    **{f"{sign}int{bits}": f"{sign.upper()}INT{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}
"""The Open Inference Protocol's name of each datatype."""

_TIE = 1e-5

Shape = tuple[int | str | None, ...]
NamedShape = tuple[int | str, ...]


@dataclass(frozen=True)
class SourceTensor:
    """An input or output. `shape` has None for a dynamic axis without a name; the first axis is the rows'.

    `precision` is the floating point that it is computed in, where that is coarser than `dtype`. `decided_by` is the
    output [rows, classes] whose largest element it names.
    """

    name: str
    dtype: str
    shape: Shape
    precision: str = ""
    decided_by: str = ""

    @property
    def datatype(self) -> str:
        return DATATYPES[self.dtype]

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(object if self.dtype == TEXT else self.dtype)

    def fits(self, array: NDArray[Any]) -> bool:
        """Whether an array has the rank, and the sizes that are fixed."""
        return array.ndim == len(self.shape) and all(
            not isinstance(size, int) or size == came for size, came in zip(self.shape, array.shape, strict=True)
        )


class Source(Protocol):
    """A trained model. Inputs and outputs are in its own order."""

    @property
    def name(self) -> str: ...

    @property
    def description(self) -> str:
        """What gives the answers: `keras 3.15.1`."""

    @property
    def inputs(self) -> Sequence[SourceTensor]: ...

    @property
    def outputs(self) -> Sequence[SourceTensor]: ...

    def answer(self, rows: Tensors) -> dict[str, NDArray[Any]]:
        """Runs the model. Raises whatever the model raises."""

    def random_rows(self, shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, NDArray[Any]]:
        """Rows of the given shapes that the model takes; the same seed gives the same rows."""

    def to_onnx(self, signature: Signature) -> Any:  # noqa: ANN401 ONNX publishes no types
        """The model as an `onnx.ModelProto` with this signature. Raises `UnsupportedModelError`."""

    def close(self) -> None:
        """Ends what the source has running. It is asked nothing more."""

    def own_rows(self) -> Mapping[str, Tensors]:
        """Rows that this kind of model may be converted wrongly on, by what they are called; often none."""


def precision_of(tensors: Iterable[SourceTensor]) -> str:
    """The coarsest floating point that the tensors are computed in: `float16` or `float32`."""
    return "float16" if any("float16" in {tensor.dtype, tensor.precision} for tensor in tensors) else "float32"


def axis_names(tensors: Sequence[SourceTensor], share: Literal["none", "meaning", "all"]) -> dict[str, NamedShape]:
    """The shape of each input with its dynamic axes named; those of one name must agree in size.

    `meaning` gives axes of one meaning (`sequence`) one name in all inputs, `all` gives all one name, as queries and
    keys of one sequence need it. Otherwise each input has its own (`question_sequence`), unless it is the only one with
    that meaning. Axes with names keep them.
    """
    meanings = [_AXES.get(len(tensor.shape), {}).get(axis) for tensor, axis in _dynamic_axes(tensors)]
    first = next((meaning for meaning in meanings if meaning), "size")

    def name(tensor: SourceTensor, axis: int) -> str:
        meaning = first if share == "all" else _AXES.get(len(tensor.shape), {}).get(axis)
        if meaning is None:
            return f"{tensor.name}_axis_{axis}"
        return meaning if share != "none" or meanings.count(meaning) == 1 else f"{tensor.name}_{meaning}"

    return {
        tensor.name: tuple(
            BATCH if size is None and axis == 0 else name(tensor, axis) if size is None else size
            for axis, size in enumerate(tensor.shape)
        )
        for tensor in tensors
    }


def datatype_of(array: NDArray[Any]) -> str:
    """The Open Inference Protocol's name of an array's datatype."""
    return DATATYPES[TEXT if array.dtype == object else array.dtype.name]


def undecided(outputs: Iterable[SourceTensor], answers: Tensors) -> dict[str, NDArray[np.bool_]]:
    """Rows whose class rounding decides: of a hundred trees, fifty may say one thing and fifty the other."""
    found = {}
    for tensor in outputs:
        if tensor.decided_by:
            best = np.sort(answers[tensor.decided_by], axis=-1)[:, -2:].astype(np.float64)
            found[tensor.name] = (np.ptp(best, axis=-1) <= _TIE) & (best.shape[-1] > 1)
    return found


def as_text(array: NDArray[Any]) -> NDArray[Any]:
    """Texts of any kind, of bytes too, as objects of type `str`. Raises `InvalidSamplesError`."""
    try:
        texts = [item.decode() if isinstance(item, bytes) else str(item) for item in array.ravel().tolist()]
    except UnicodeDecodeError as error:
        raise InvalidSamplesError(f"Texts need to be UTF-8; got {error.object[:32]!r}: {error.reason}.") from error
    return np.array(texts, dtype=object).reshape(array.shape)


def fitted_samples(
    tensors: Sequence[SourceTensor], samples: Mapping[str, NDArray[Any]]
) -> tuple[int, dict[str, NDArray[Any]]]:
    """The number of rows, and the rows in the model's datatypes. Raises `InvalidSamplesError`."""
    names = [tensor.name for tensor in tensors]
    if sorted(samples) != sorted(names):
        raise InvalidSamplesError(f"Samples are needed for the inputs {names}, one array each; got {sorted(samples)}.")
    rows = {tensor.name: _fitted(tensor, np.asarray(samples[tensor.name])) for tensor in tensors}
    counts = {name: len(array) for name, array in rows.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise InvalidSamplesError(f"Samples need the same number of rows for every input, at least one; got {counts}.")
    return counts[names[0]], rows


def _dynamic_axes(tensors: Iterable[SourceTensor]) -> Iterator[tuple[SourceTensor, int]]:
    for tensor in tensors:
        yield from ((tensor, axis) for axis, size in enumerate(tensor.shape) if size is None and axis > 0)


def _fitted(tensor: SourceTensor, array: NDArray[Any]) -> NDArray[Any]:
    if not tensor.fits(array):
        wanted = ", ".join(BATCH if axis == 0 else str(size or "any") for axis, size in enumerate(tensor.shape))
        raise InvalidSamplesError(
            f"Samples of the input {tensor.name!r} need the shape [{wanted}]; got {list(array.shape)}."
        )
    is_text = array.dtype.kind in "OSU"
    if is_text != (tensor.dtype == TEXT) or not np.can_cast(array.dtype, tensor.numpy_dtype, casting="same_kind"):
        raise InvalidSamplesError(
            f"Samples of the input {tensor.name!r} need the type {tensor.dtype}; got {array.dtype}."
        )
    return as_text(array) if is_text else array.astype(tensor.dtype)
