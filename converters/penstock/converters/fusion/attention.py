"""Attention over heads, as keras.layers writes it with Einsum, as ONNX Runtime's MultiHeadAttention.

The operator's query, key and value have their heads side by side in the last axis: [batch, sequence, heads · size]. A
mask becomes an addition to the scores, of the very number that Keras puts where nothing may be looked at: a row that
may look at nothing looks at everything alike, in both.
"""

from dataclasses import dataclass

import numpy as np
import onnx

from penstock.converters.fusion.graph import Graph, attribute
from penstock.converters.gate import RUNTIME_DOMAIN


@dataclass(frozen=True)
class _Scores:
    """What stands before the Softmax. `mask` and `masked_value` are None without a mask."""

    query: str
    key: str
    scale: float
    mask: str | None
    masked_value: str | None
    tensors: tuple[str, ...]


def fuse_attention(graph: Graph) -> None:
    """Einsum(Softmax(mask(scale · Einsum(q, k))), v) -> MultiHeadAttention(q, k, v, mask)."""
    for node in graph.nodes("Einsum"):
        if _labels(node) != "abcd,adbe->acbe":
            continue
        softmax = graph.made_by(node.input[0], "Softmax")
        if (
            softmax is None
            or attribute(softmax, "axis", -1) not in {-1, 3}
            or not graph.is_only_for(node.input[0], node)
        ):
            continue
        scores = _scores(graph, softmax)
        if scores is not None and _are_hidden(graph, scores):
            _write(graph, node, scores)


def _write(graph: Graph, node: onnx.NodeProto, scores: _Scores) -> None:
    name = node.name
    tensors = (scores.query, scores.key, node.input[1])
    sizes = [_head_sizes(graph, tensor) for tensor in tensors]
    (heads, _), _, (_, value_size) = sizes
    if not all(count == heads and size for count, size in sizes):
        return
    flat = [
        graph.add("Reshape", [tensor, _sizes(graph, [0, 0, count * size], name)], f"{name}/flat")
        for tensor, (count, size) in zip(tensors, sizes, strict=True)
    ]
    batch, queries = (_size(graph, scores.query, axis, name) for axis in (0, 1))
    keys = _size(graph, scores.key, 1, name)
    for reader in _shape_readers(graph, scores):
        graph.add(
            "Concat", [batch, _sizes(graph, [heads], name), queries, keys], f"{name}/shape", reader.output[0], axis=0
        )
    bias = _bias(graph, scores, [queries, keys], name)
    answer = graph.add(
        "MultiHeadAttention",
        [*flat, "", "", bias] if bias else flat,
        name,
        domain=RUNTIME_DOMAIN,
        num_heads=heads,
        scale=scores.scale,
    )
    before = graph.shape(scores.query) or ()
    graph.declare(answer, (*before[:2], heads * value_size))
    graph.add("Reshape", [answer, _sizes(graph, [0, 0, heads, value_size], name)], f"{name}/heads", node.output[0])


def _head_sizes(graph: Graph, tensor: str) -> tuple[int, int]:
    """How many heads of what size a float32 tensor [batch, sequence, heads, size] has; zeros if that is not known."""
    shape = graph.shape(tensor)
    if shape is None or len(shape) != 4 or graph.datatype(tensor) != onnx.TensorProto.FLOAT:
        return 0, 0
    heads, size = shape[2:]
    return (heads, size) if isinstance(heads, int) and isinstance(size, int) else (0, 0)


def _sizes(graph: Graph, values: list[int], name: str) -> str:
    return graph.add_constant(values, f"{name}/sizes", np.int64)


def _scores(graph: Graph, softmax: onnx.NodeProto) -> _Scores | None:
    tensor = softmax.input[0]
    mask, masked_value = None, None
    tensors = [tensor]
    if (masked := _masked(graph, tensor)) is not None:
        tensor, mask, masked_value = masked
        tensors.append(tensor)
    scale = 1.0
    scaled = graph.made_by(tensor, "Mul")
    if scaled is not None:
        for one, other in graph.operands(scaled):
            factor = graph.constant(other)
            if factor is not None and factor.size == 1 and graph.made_by(one, "Einsum") is not None:
                tensor, scale = one, float(factor.item())
                tensors.append(tensor)
                break
    product = graph.made_by(tensor, "Einsum")
    labels = _labels(product) if product is not None else ""
    if product is None or labels not in {"abcd,aecd->acbe", "abcd,aecd->aceb"}:
        return None
    query, key = product.input if labels == "abcd,aecd->acbe" else reversed(product.input)
    return _Scores(query, key, scale, mask, masked_value, tuple(tensors))


def _masked(graph: Graph, tensor: str) -> tuple[str, str, str] | None:
    """The scores, the mask, and the number where it is false."""
    chosen = graph.made_by(tensor, "Where")
    if chosen is not None and _is_number(graph, chosen.input[2]):
        return chosen.input[1], chosen.input[0], chosen.input[2]
    total = graph.made_by(tensor, "Add")
    if total is None:
        return None
    for kept, filled in graph.operands(total):
        kept_product, filled_product = graph.made_by(kept, "Mul"), graph.made_by(filled, "Mul")
        if kept_product is None or filled_product is None:
            continue
        for flag, scores in graph.operands(kept_product):
            for number, inverse in graph.operands(filled_product):
                mask, negated = graph.made_by(flag, "Cast"), graph.made_by(inverse, "Cast")
                negation = graph.made_by(negated.input[0], "Not") if negated is not None else None
                is_choice = mask is not None and negation is not None and mask.input[0] == negation.input[0]
                if mask is not None and is_choice and _is_number(graph, number):
                    return scores, mask.input[0], number
    return None


def _is_number(graph: Graph, tensor: str) -> bool:
    """A float32 so low that no score comes near it."""
    value = graph.constant(tensor)
    return value is not None and value.size == 1 and value.dtype == np.float32 and float(value.item()) < -1e9


def _are_hidden(graph: Graph, scores: _Scores) -> bool:
    """Whether nobody reads the scores, but for their whole shape."""
    readers = [node for tensor in scores.tensors for node in graph.readers(tensor) if node.op_type != "Shape"]
    chain = {id(node): node for node in readers}
    return (
        len(chain) == len(scores.tensors)
        and all(graph.is_inner(tensor) for tensor in scores.tensors)
        and not any(node.attribute for node in _shape_readers(graph, scores))
    )


def _shape_readers(graph: Graph, scores: _Scores) -> list[onnx.NodeProto]:
    return [node for tensor in scores.tensors for node in graph.readers(tensor) if node.op_type == "Shape"]


def _bias(graph: Graph, scores: _Scores, sizes: list[str], name: str) -> str | None:
    """Zero where the mask is true, [batch or 1, heads or 1, queries, keys]."""
    if scores.mask is None or scores.masked_value is None:
        return None
    mask = scores.mask
    both = graph.made_by(mask, "And")
    if both is not None:
        mask = next((other for one, other in graph.operands(both) if _is_all_true(graph, one)), mask)
    one = _sizes(graph, [1], name)
    shape = graph.add("Concat", [one, one, *sizes], f"{name}/shape", axis=0)
    true = graph.add_constant(np.True_, f"{name}/true")
    full = graph.add("And", [graph.add("Expand", [true, shape], f"{name}/all"), mask], f"{name}/mask")
    return graph.add(
        "Where", [full, graph.add_constant(0.0, f"{name}/zero", np.float32), scores.masked_value], f"{name}/bias"
    )


def _is_all_true(graph: Graph, tensor: str) -> bool:
    expanded = graph.made_by(tensor, "Expand")
    value = graph.constant(expanded.input[0]) if expanded is not None else None
    return value is not None and value.dtype == np.bool_ and bool(value.all())


def _size(graph: Graph, tensor: str, axis: int, name: str) -> str:
    return graph.add("Shape", [tensor], f"{name}/size", start=axis, end=axis + 1)


def _labels(node: onnx.NodeProto) -> str:
    """The equation with its labels in the order of the alphabet."""
    equation = attribute(node, "equation").decode().replace(" ", "")
    letters = dict.fromkeys(letter for letter in equation if letter.isalpha())
    return str(
        equation.translate({ord(letter): "abcdefghijklmnopqrstuvwxyz"[index] for index, letter in enumerate(letters)})
    )
