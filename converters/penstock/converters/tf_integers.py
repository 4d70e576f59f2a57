"""More of what `tf_operators` is for: integers, which tf2onnx and ONNX Runtime would count in floating point."""

from typing import Any

import numpy as np
from onnx import TensorProto
from tf2onnx.handler import tf_op
from tf2onnx.onnx_opset.reduction import ReduceOpBase
from tf2onnx.onnx_opset.tensor import TopKV2
from tf2onnx.optimizer import back_to_back_optimizer

from penstock.converters.tf_operators import CHOSEN, OPSET, Nodes, Replacement, translates

_FACTORS = 64
"""A product of so many integers is written out."""

_ADDED = {TensorProto.INT32, TensorProto.INT64, TensorProto.FLOAT16, TensorProto.FLOAT, TensorProto.DOUBLE}

# ONNX Runtime orders these; narrower ones fit into int32.
_ORDERED = {TensorProto.INT64: TensorProto.INT64, TensorProto.UINT32: TensorProto.INT64}


@translates("OneHot")
def _one_hot(new: Replacement, node: Nodes) -> None:
    """A comparison with 0, 1, …: ONNX's own operator counts negative numbers from the end, TensorFlow finds none."""
    numbers, size, on, off = new.inputs
    axis = node.get_attr_value("axis", default=-1)
    behind = 0 if axis == -1 else node.graph.get_rank(numbers) - axis
    to_int64 = {"to": TensorProto.INT64}
    known = new("Range", new.constant(0, np.int64), new("Cast", size, **to_int64), new.constant(1, np.int64))
    known = new("Reshape", known, new.constant([-1, *[1] * behind], np.int64))
    is_it = new("Equal", new("Unsqueeze", new("Cast", numbers, **to_int64), new.constant([axis], np.int64)), known)
    datatype = node.graph.get_dtype(node.output[0])
    if datatype == TensorProto.BOOL:
        new.becomes(new("Or", new("And", is_it, on), new("And", new("Not", is_it), off)))
    elif datatype in CHOSEN:
        new.becomes(new("Where", is_it, on, off))
    else:
        wider = TensorProto.FLOAT if datatype == TensorProto.FLOAT16 else TensorProto.INT64
        on, off = (new("Cast", value, to=wider) for value in (on, off))
        new.becomes(new("Cast", new("Where", is_it, on, off), to=datatype))


@translates("LeftShift", "RightShift")
def _shift(new: Replacement, node: Nodes) -> None:
    """Signed integers, too, which ONNX does not shift: times a power of two, or divided by it and rounded down."""
    x, count = new.inputs
    datatype = new.datatype(x)
    bits = np.iinfo(datatype).bits
    one, last = new.constant(1, np.uint64), new.constant(bits - 1, np.int64)
    places = new("Max", new("Min", new("Cast", count, to=TensorProto.INT64), last), new.constant(0, np.int64))
    power = new("BitShift", one, new("Cast", places, to=TensorProto.UINT64), direction="LEFT")
    whole = TensorProto.UINT64 if datatype.kind == "u" else TensorProto.INT64
    x, power = (new("Cast", tensor, to=whole) for tensor in (x, power))
    if node.type == "RightShift":
        remainder = new("Mod", x, power)
        shifted = new("Div", new("Sub", x, remainder), power)
    else:
        shifted = new("Mul", x, power)
    new.becomes(new("Cast", shifted, to=node.graph.get_dtype(node.output[0])))


@translates("InTopKV2")
def _in_top(new: Replacement, _: Nodes) -> None:
    """Whether fewer than k of a row are above the target's number, all are numbers, and the target is one of them."""
    scores, targets, k = new.inputs
    column, none = new.constant([1], np.int64), new.constant(0, np.int64)
    targets = new("Cast", targets, to=TensorProto.INT64)
    last = new("Sub", new("Gather", new("Shape", scores), new.constant(1, np.int64)), new.constant(1, np.int64))
    known = new("Max", new("Min", targets, last), none)
    target = new("GatherElements", scores, new("Unsqueeze", known, column), axis=1)
    above = new("Cast", new("Less", target, scores), to=TensorProto.INT64)
    is_strange = new("Or", new("IsNaN", scores), new("IsInf", scores))
    strange = new("ReduceMax", new("Cast", is_strange, to=TensorProto.INT32), column, keepdims=0)
    fewer = new("Less", new("ReduceSum", above, column, keepdims=0), new("Cast", k, to=TensorProto.INT64))
    is_answer = new("And", new("Equal", targets, known), new("Not", new("Cast", strange, to=TensorProto.BOOL)))
    new.becomes(new("And", fewer, is_answer))


def _largest(graph: Nodes, node: Nodes, **options: object) -> None:
    """Integers are ordered as integers."""
    datatype = graph.get_dtype(node.input[0])
    values = node.output[0]
    TopKV2.version_13(graph, node, **options)
    if np.issubdtype(Replacement(graph, node).datatype(values), np.integer):
        ordered = _ORDERED.get(datatype, TensorProto.INT32)
        graph.get_node_by_output(node.input[0]).set_attr("to", ordered)
        graph.set_dtype(node.input[0], ordered)
        graph.set_dtype(node.output[0], ordered)


tf_op.register_handler(_largest, OPSET, ["TopKV2"], "", {"onnx_op": "TopK"})


def _total(graph: Nodes, node: Nodes, **options: object) -> None:
    """ONNX Runtime adds up int32 and int64 alone of integers."""
    datatype, output = graph.get_dtype(node.input[0]), node.output[0]
    ReduceOpBase.version_13(graph, node, **options)
    if datatype not in _ADDED:
        graph.insert_new_node_on_input(node, "Cast", node.input[0], to=TensorProto.INT64)
        graph.set_dtype(output, TensorProto.INT64)
        narrowed = graph.insert_new_node_on_output("Cast", output, to=datatype)
        graph.set_dtype(narrowed.output[0], datatype)
        graph.copy_shape(output, narrowed.output[0])


tf_op.register_handler(_total, OPSET, ["Sum"], "", {"onnx_op": "ReduceSum"})


def _product(graph: Nodes, node: Nodes, **options: object) -> None:
    """Integers are multiplied one by one: ONNX Runtime's product of many goes by way of float64."""
    new = Replacement(graph, node)
    axes = np.ravel(node.inputs[1].get_tensor_value()).tolist() if node.inputs[1].is_const() else []
    shape = graph.get_shape(node.input[0]) or []
    size = shape[axes[0]] if len(axes) == 1 and shape else -1
    if not np.issubdtype(new.datatype(node.input[0]), np.integer) or not 0 < size <= _FACTORS:
        ReduceOpBase.version_18(graph, node, **options)
        return
    indices = [[index] if node.get_attr_value("keep_dims", 0) else index for index in range(size)]
    factors = [new("Gather", new.inputs[0], new.constant(index, np.int64), axis=axes[0]) for index in indices]
    product = factors[0]
    for factor in factors[1:]:
        product = new("Mul", product, factor)
    new.becomes(product)


tf_op.register_handler(_product, OPSET, ["Prod"], "", {"onnx_op": "ReduceProd"})

_shortened = back_to_back_optimizer._func_map[("Cast",)]  # noqa: SLF001 the only list of them


def _casts(graph: Nodes, node: Nodes, readers: list[Nodes]) -> Any:  # noqa: ANN401 what tf2onnx goes on with
    """A cast that loses digits stays in front of one to integers: of 2²⁴ + 1 float32 makes another integer."""
    new = Replacement(graph, node)
    is_exact = np.can_cast(new.datatype(node.input[0]), new.datatype(node.output[0]))
    if not is_exact and any(np.issubdtype(new.datatype(reader.output[0]), np.integer) for reader in readers):
        return [reader.output[0] for reader in readers]
    return _shortened(graph, node, readers)


back_to_back_optimizer._func_map[("Cast",)] = _casts  # noqa: SLF001 the only list of them
