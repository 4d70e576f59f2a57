"""Attention over heads as ONNX Runtime's MultiHeadAttention: with Einsum, as keras.layers writes it, or with MatMul.

The operator's query, key and value have their heads side by side in the last axis: [batch, sequence, heads · size]. A
mask becomes an addition to the scores, of the very number that Keras puts where nothing may be looked at: a row that
may look at nothing looks at everything alike, in both.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx

from penstock.converters.fusion.graph import Graph, Shape, attribute
from penstock.converters.gate import RUNTIME_DOMAIN

_HEADS = [0, 2, 1, 3]
"""[batch, heads, sequence, size] to [batch, sequence, heads, size] and back."""
_KEYS = [0, 3, 1, 2]
"""[batch, heads, size, sequence] to [batch, sequence, heads, size]."""
_RANK = 4


@dataclass(frozen=True)
class _Scores:
    """What stands before the Softmax. `mask` and `masked_value` are None without a mask, `bias` if nothing is added."""

    query: str
    key: str
    scale: float
    mask: str | None
    masked_value: str | None
    tensors: tuple[str, ...]
    bias: str | None = None


def fuse_attention(graph: Graph) -> None:
    """Einsum(Softmax(mask(scale · Einsum(q, k))), v) -> MultiHeadAttention(q, k, v, mask)."""
    for node in graph.nodes("Einsum"):
        if _labels(node) != "abcd,adbe->acbe":
            continue
        softmax = _softmax(graph, node)
        scores = _scores(graph, softmax) if softmax is not None else None
        if scores is None or not _are_hidden(graph, scores):
            continue
        answer = _attention(graph, node, scores, node.input[1])
        if answer is not None:
            graph.add("Reshape", answer, f"{node.name}/heads", node.output[0])


def fuse_product_attention(graph: Graph) -> None:
    """MatMul(Softmax(mask(MatMul(scale · q, kᵀ))), v) -> MultiHeadAttention(q, k, v, mask), transposed.

    There, heads stand before the sequence; transposed twice, in the end nothing is.
    """
    for node in graph.nodes("MatMul"):
        softmax = _softmax(graph, node)
        scores = _product_scores(graph, softmax) if softmax is not None else None
        if scores is None or not _are_hidden(graph, scores):
            continue
        tensors = ((scores.query, _HEADS), (scores.key, _KEYS), (node.input[1], _HEADS))
        shapes = [graph.shape(tensor) for tensor, _ in tensors]
        if not _are_of_one_batch(shapes):
            continue
        query, key, value = (_transposed(graph, tensor, perm, node.name) for tensor, perm in tensors)
        answer = _attention(graph, node, replace(scores, query=query, key=key), value)
        if answer is not None:
            rows = graph.add("Reshape", answer, f"{node.name}/heads")
            graph.add("Transpose", [rows], f"{node.name}/answer", node.output[0], perm=_HEADS)


def _are_of_one_batch(shapes: Sequence[Shape | None]) -> bool:
    """Whether all have four axes, and none is repeated along the batch: the operator would not do that."""
    firsts = [shape[0] for shape in shapes if shape is not None and len(shape) == _RANK]
    return len(firsts) == len(shapes) and len(set(firsts)) == 1


def _transposed(graph: Graph, tensor: str, perm: list[int], name: str) -> str:
    transposed = graph.add("Transpose", [tensor], f"{name}/rows", perm=perm)
    shape = graph.shape(tensor) or ()
    graph.know(transposed, graph.datatype(tensor), tuple(shape[axis] for axis in perm))
    return transposed


def _softmax(graph: Graph, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The Softmax over the last of four axes that only this node reads, first."""
    softmax = graph.made_by(node.input[0], "Softmax")
    if softmax is None or attribute(softmax, "axis", -1) not in {-1, 3}:
        return None
    return softmax if graph.is_only_for(node.input[0], node) else None


def _attention(graph: Graph, node: onnx.NodeProto, scores: _Scores, value: str) -> list[str] | None:
    """Adds the operator: its answer, flat, and its sizes with heads. None where the heads are not known."""
    name = node.name
    tensors = (scores.query, scores.key, value)
    sizes = [_head_sizes(graph, tensor) for tensor in tensors]
    (heads, _), _, (_, value_size) = sizes
    if not all(count == heads and size for count, size in sizes) or not _are_widened(graph, scores, heads):
        return None
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
    return [answer, _sizes(graph, [0, 0, heads, value_size], name)]


def _are_widened(graph: Graph, scores: _Scores, heads: int) -> bool:
    """Whether a mask or bias is repeated for the scores and not they for it, as far as sizes are known."""
    shape = graph.shape(scores.bias or scores.mask or "")
    if shape is None:
        return True
    before, keys = (graph.shape(tensor) or (None, None) for tensor in (scores.query, scores.key))
    whole = (before[0], heads, before[1], keys[1])
    return len(shape) <= _RANK and all(
        size in {1, None, known} or (isinstance(known, str) and isinstance(size, str) and axis < _RANK - 1)
        for axis, (size, known) in enumerate(zip(reversed(shape), reversed(whole), strict=False))
    )


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


def _product_scores(graph: Graph, softmax: onnx.NodeProto) -> _Scores | None:
    """Those of a MatMul; a mask is chosen, or added as a bias."""
    tensor = softmax.input[0]
    tensors = [tensor]
    mask, masked_value, bias = None, None, None
    if (masked := _masked(graph, tensor)) is not None:
        tensor, mask, masked_value = masked
        tensors.append(tensor)
    elif (total := graph.made_by(tensor, "Add")) is not None:
        sides = [pair for pair in graph.operands(total) if _scaled(graph, pair[0], "MatMul")[2] is not None]
        if len(sides) != 1:
            return None
        tensor, bias = sides[0]
        tensors.append(tensor)
    unscaled, scale, product = _scaled(graph, tensor, "MatMul")
    if product is None:
        return None
    if unscaled != tensor:
        tensors.append(unscaled)
    query, query_scale, _ = _scaled(graph, product.input[0])
    key, key_scale, _ = _scaled(graph, product.input[1])
    return _Scores(query, key, scale * query_scale * key_scale, mask, masked_value, tuple(tensors), bias)


def _scaled(graph: Graph, tensor: str, *operators: str) -> tuple[str, float, onnx.NodeProto | None]:
    """What a tensor is a multiple of, how many times that, and the node that makes it, if it is one of these."""
    node = graph.made_by(tensor, "Mul", "Div")
    if node is not None:
        pairs = list(graph.operands(node))
        for other, number in pairs if node.op_type == "Mul" else pairs[:1]:
            factor = graph.constant(number)
            if factor is not None and factor.size == 1 and factor.ndim <= _RANK and factor.item():
                scale = float(factor.item())
                return other, scale if node.op_type == "Mul" else 1 / scale, graph.made_by(other, *operators)
    return tensor, 1.0, graph.made_by(tensor, *operators)


def _masked(graph: Graph, tensor: str) -> tuple[str, str, str] | None:
    """The scores, the mask, and the number where it is false."""
    chosen = graph.made_by(tensor, "Where")
    if chosen is not None and _is_number(graph, chosen.input[2]):
        return chosen.input[1], chosen.input[0], chosen.input[2]
    if chosen is not None and _is_number(graph, chosen.input[1]):
        return chosen.input[2], graph.add("Not", [chosen.input[0]], f"{chosen.name}/mask"), chosen.input[1]
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
    """A float32 so low that a score added to it is lost: a row of nothing else looks at everything alike."""
    value = graph.constant(tensor)
    return value is not None and value.size == 1 and value.dtype == np.float32 and float(value.item()) < -1e30


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
    """What is added to the scores, zero where a mask is true: [batch or 1, heads or 1, queries, keys]."""
    if scores.bias is not None:
        return graph.add("Expand", [scores.bias, _square(graph, sizes, name)], f"{name}/bias")
    if scores.mask is None or scores.masked_value is None:
        return None
    mask = scores.mask
    both = graph.made_by(mask, "And")
    if both is not None:
        mask = next((other for one, other in graph.operands(both) if _is_all_true(graph, one)), mask)
    true = graph.add_constant(np.True_, f"{name}/true")
    full = graph.add(
        "And", [graph.add("Expand", [true, _square(graph, sizes, name)], f"{name}/all"), mask], f"{name}/mask"
    )
    return graph.add(
        "Where", [full, graph.add_constant(0.0, f"{name}/zero", np.float32), scores.masked_value], f"{name}/bias"
    )


def _square(graph: Graph, sizes: list[str], name: str) -> str:
    """The sizes [1, 1, queries, keys]."""
    one = _sizes(graph, [1], name)
    return graph.add("Concat", [one, one, *sizes], f"{name}/shape", axis=0)


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
