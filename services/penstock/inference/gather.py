"""From requests to the inputs of one run, and from its outputs to their answers."""

from collections.abc import Sequence

import numpy as np

from penstock.inference.inference import Inference
from penstock.inference.padding import Padding
from penstock.inference.signature import Signature
from penstock.inference.tensors import BYTES, Array
from penstock.rpc.errors import PenstockError

# Requests with equal keys fit into one batch: the shapes of their rows, by input.
RowKey = tuple[tuple[str, tuple[int, ...]], ...]

# Fresh memory of this size costs a page fault every 4 KiB; smaller pieces the allocator has at hand.
_REUSED_BYTES = 256 * 1024


class Gatherer:
    """Gathers for one instance: what it returned is overwritten when it gathers again."""

    def __init__(self, signature: Signature, padding: Padding | None) -> None:
        self._signature = signature
        self._padding = padding
        self._buffers: dict[str, Array] = {}

    def inputs(self, batch: Sequence[Inference]) -> dict[str, Array]:
        """The inputs of a run of all requests, one after another along the first axis."""
        if self._padding is None:
            if len(batch) == 1:
                return {name: _aligned(array) for name, array in batch[0].inputs.items()}
            return {name: self._joined(name, [one.inputs[name] for one in batch]) for name in batch[0].inputs}
        tensors = self._signature.inputs
        return {
            name: self._joined(name, [self._padding.padded(tensors[name], one.inputs[name]) for one in batch])
            for name in batch[0].inputs
        }

    def wanted(self, batch: Sequence[Inference]) -> Sequence[str]:
        """The outputs that some request wants, in the model's order or, where all want the same, in theirs."""
        first = batch[0].outputs
        if all(one.outputs == first for one in batch):
            return first
        return [name for name in self._signature.outputs if any(name in one.outputs for one in batch)]

    def answers(self, batch: Sequence[Inference], names: Sequence[str], arrays: list[Array]) -> list[list[Array]]:
        """Each request's outputs, views of the run's. Raises `PenstockError` if an output has not a row for each."""
        if len(batch) == 1 and self._padding is None:
            return [arrays]
        total = sum(one.rows for one in batch)
        by_name = dict(zip(names, arrays, strict=True))
        for name, array in by_name.items():
            if array.shape[:1] != (total,):
                raise PenstockError(f"Output {name!r} has shape {list(array.shape)} for a batch of {total} rows.")
        parts, start = [], 0
        for one in batch:
            end = start + one.rows
            parts.append([by_name[name][start:end] for name in one.outputs])
            start = end
        if self._padding is not None:
            return [self._trimmed(self._padding, one, part) for one, part in zip(batch, parts, strict=True)]
        return parts

    def _joined(self, name: str, arrays: list[Array]) -> Array:
        first = arrays[0]
        if len(arrays) == 1:
            return _aligned(first)
        rows = sum(len(array) for array in arrays)
        nbytes = rows * first[:1].nbytes
        if first.dtype == BYTES.dtype or nbytes < _REUSED_BYTES:
            return np.concatenate(arrays)
        buffer = self._buffers.get(name)
        if buffer is None or buffer.nbytes < nbytes:
            buffer = self._buffers[name] = np.empty(nbytes, np.uint8)
        shape = (rows, *first.shape[1:])
        return np.concatenate(arrays, out=buffer[:nbytes].view(first.dtype).reshape(shape))

    def _trimmed(self, padding: Padding, inference: Inference, part: list[Array]) -> list[Array]:
        length = next(
            array.shape[at]
            for name, array in inference.inputs.items()
            if (at := padding.axis_of(self._signature.inputs[name])) is not None
        )
        return [
            padding.trimmed(self._signature.outputs[name], array, length)
            for name, array in zip(inference.outputs, part, strict=True)
        ]


def _aligned(array: Array) -> Array:
    """A view of a message may begin at any byte; what runs the model expects whole elements."""
    return array if array.flags.aligned else array.copy()


def row_key(signature: Signature, padding: Padding | None, inference: Inference) -> RowKey:
    """What has to be equal for two requests to share a run."""
    if signature.uniform:
        return ()
    shapes = ((name, array.shape[1:]) for name, array in sorted(inference.inputs.items()))
    if padding is None:
        return tuple(shapes)
    return tuple((name, _bucketed(signature, padding, name, shape)) for name, shape in shapes)


def _bucketed(signature: Signature, padding: Padding, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    at = padding.axis_of(signature.inputs[name])
    if at is None:
        return shape
    return (*shape[: at - 1], padding.bucket(shape[at - 1]), *shape[at:])
