"""What a graph computes of sizes that are known before it runs: a scale 1 / √size, say, that was written as Shape."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx
from numpy.typing import NDArray

from penstock.converters.fusion.graph import Graph, Shape, attribute

_FUNCTIONS: dict[str, Callable[[NDArray[np.float32]], NDArray[np.float32]]] = {
    "Reciprocal": np.reciprocal,
    "Sqrt": np.sqrt,
}


_WHOLE: dict[int, type[np.int32 | np.int64]] = {onnx.TensorProto.INT32: np.int32, onnx.TensorProto.INT64: np.int64}
_CASTS: dict[int, type[np.int32 | np.int64 | np.float32]] = {**_WHOLE, onnx.TensorProto.FLOAT: np.float32}


@dataclass(frozen=True)
class _Sizes:
    """Some sizes of a tensor, of which not all need be known, as a vector of this datatype."""

    sizes: Shape
    dtype: type[np.int32 | np.int64]

    def vector(self) -> NDArray[np.int32 | np.int64] | None:
        known = [size for size in self.sizes if isinstance(size, int)]
        return np.asarray(known, self.dtype) if len(known) == len(self.sizes) else None


def fold_sizes(graph: Graph) -> None:
    """Sizes taken from a Shape, and functions of them -> constants, where they are known."""
    known: dict[str, _Sizes] = {}
    for node in graph.nodes("Shape", "Slice", "Squeeze", "Cast", *_FUNCTIONS):
        taken = _taken(graph, node, known)
        value = _function(graph, node) if taken is None else taken.vector()
        constant = graph.add_constant(value, node.name) if value is not None else None
        if constant is not None and graph.is_inner(node.output[0]):
            graph.redirect(node.output[0], constant)
        if taken is not None:
            known |= {name: taken for name in (node.output[0], constant) if name}


def _taken(graph: Graph, node: onnx.NodeProto, known: Mapping[str, _Sizes]) -> _Sizes | None:
    """The sizes that a node passes on: all of a tensor's, or some of those that came."""
    if node.op_type == "Shape":
        shape = graph.shape(node.input[0])
        part = slice(attribute(node, "start", 0), attribute(node, "end"))
        return None if shape is None else _Sizes(shape[part], np.int64)
    came = known.get(node.input[0])
    if came is None:
        return None
    if node.op_type == "Cast":
        return replace(came, dtype=_WHOLE[attribute(node, "to")]) if attribute(node, "to") in _WHOLE else None
    bounds = [graph.constant(tensor) for tensor in node.input[1:]]
    if (
        node.op_type != "Slice"
        or len(bounds) not in {2, 3}
        or any(bound is None or bound.size != 1 for bound in bounds)
    ):
        return None
    start, end = (int(bound.item()) for bound in bounds[:2] if bound is not None)
    return replace(came, sizes=came.sizes[start:end])


def _function(graph: Graph, node: onnx.NodeProto) -> NDArray[np.generic] | None:
    """What a node makes of one constant number."""
    value = graph.constant(node.input[0]) if node.op_type != "Shape" else None
    if value is None or value.size != 1:
        return None
    if node.op_type == "Squeeze":
        return value.reshape(()) if len(node.input) == 1 or value.ndim == 1 else None
    if node.op_type == "Cast":
        return value.astype(_CASTS[attribute(node, "to")]) if attribute(node, "to") in _CASTS else None
    return _FUNCTIONS[node.op_type](value) if node.op_type in _FUNCTIONS and value.dtype == np.float32 else None
