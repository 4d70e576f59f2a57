"""GELU, as TensorFlow spells it out, as an operator of ONNX Runtime: one pass over wide tensors instead of nine."""

from math import sqrt

import onnx

from penstock.converters.fusion.graph import Graph
from penstock.converters.gate import RUNTIME_DOMAIN

_CUBIC = 0.044715


def fuse_gelu(graph: Graph) -> None:
    """Half of x, times 1 − erf(−x / √2) -> Gelu(x); times 1 + tanh(√(2/π) · (x + 0.044715 · x³)) -> FastGelu(x).

    Hendrycks and Gimpel, https://arxiv.org/abs/1606.08415.
    """
    for node in graph.nodes("Mul"):
        for half, factor in graph.operands(node):
            rows = _scaled(graph, half, 0.5)
            shape = graph.shape(rows) if rows else None
            if rows is None or shape is None or graph.datatype(rows) != onnx.TensorProto.FLOAT:
                continue
            if not graph.has_rank_of(node.output[0], rows):
                continue
            is_exact = _is_error_function(graph, factor, rows)
            if is_exact or _is_hyperbolic(graph, factor, rows):
                answer = graph.add(
                    "Gelu" if is_exact else "FastGelu", [rows], node.name, node.output[0], domain=RUNTIME_DOMAIN
                )
                graph.declare(answer, shape)
                break


def _is_error_function(graph: Graph, tensor: str, rows: str) -> bool:
    """1 − erf(−x · 1/√2)."""
    difference = graph.made_by(tensor, "Sub")
    if difference is None or not _is(graph, difference.input[0], 1.0):
        return False
    error = graph.made_by(difference.input[1], "Erf")
    scaled = _scaled(graph, error.input[0], 1 / sqrt(2)) if error is not None else None
    negated = graph.made_by(scaled, "Neg") if scaled else None
    return negated is not None and negated.input[0] == rows


def _is_hyperbolic(graph: Graph, tensor: str, rows: str) -> bool:
    """1 + tanh(√(2/π) · (x + 0.044715 · x³))."""
    curve = _added(graph, tensor, 1.0)
    tangent = graph.made_by(curve, "Tanh") if curve else None
    polynomial = _scaled(graph, tangent.input[0], 0.7978845608) if tangent is not None else None
    total = graph.made_by(polynomial, "Add") if polynomial else None
    if total is None:
        return False
    for one, other in graph.operands(total):
        cube = graph.made_by(_scaled(graph, other, _CUBIC) or "", "Pow")
        if one == rows and cube is not None and cube.input[0] == rows and _is(graph, cube.input[1], 3.0):
            return True
    return False


def _scaled(graph: Graph, tensor: str, factor: float) -> str | None:
    """What this tensor is a constant multiple of."""
    return _other(graph, graph.made_by(tensor, "Mul"), factor)


def _added(graph: Graph, tensor: str, number: float) -> str | None:
    return _other(graph, graph.made_by(tensor, "Add"), number)


def _other(graph: Graph, node: onnx.NodeProto | None, number: float) -> str | None:
    """The operand beside a constant of this value."""
    if node is None:
        return None
    return next((one for one, other in graph.operands(node) if _is(graph, other, number)), None)


def _is(graph: Graph, tensor: str, number: float) -> bool:
    """Whether a tensor is this one number, to what float32 has of it."""
    value = graph.constant(tensor)
    return value is not None and value.size == 1 and abs(float(value.item()) - number) <= 1e-6 * abs(number)
