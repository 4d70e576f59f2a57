"""More of what `tf_operators` is for: operators of TensorFlow that become a formula of several in ONNX."""

import numpy as np
from onnx import TensorProto

from penstock.converters.tf_operators import Nodes, Replacement, translates

# M. Giles, Approximating the erfinv function, GPU Computing Gems 2 (2011): single precision, highest power first.
_ERFINV_NEAR = (
    2.81022636e-08,
    3.43273939e-07,
    -3.5233877e-06,
    -4.39150654e-06,
    0.00021858087,
    -0.00125372503,
    -0.00417768164,
    0.246640727,
    1.50140941,
)
_ERFINV_FAR = (
    -0.000200214257,
    0.000100950558,
    0.00134934322,
    -0.00367342844,
    0.00573950773,
    -0.0076224613,
    0.00943887047,
    1.00167406,
    2.83297682,
)


@translates("Cross")
def _cross(new: Replacement, _: Nodes) -> None:
    """a₁b₂ − a₂b₁ and so on, around the three of them."""
    a, b = new.inputs
    ahead, behind = (new.constant(order, np.int64) for order in ([1, 2, 0], [2, 0, 1]))

    def product(first: str, second: str) -> str:
        return new("Mul", new("Gather", a, first, axis=-1), new("Gather", b, second, axis=-1))

    new.becomes(new("Sub", product(ahead, behind), product(behind, ahead)))


@translates("BroadcastArgs")
def _broadcast_shape(new: Replacement, node: Nodes) -> None:
    """Where one of two shapes has a 1, the other counts; the shorter one has more of them in front."""
    sizes = [new("Cast", shape, to=TensorProto.INT64) for shape in new.inputs]
    ranks = [node.graph.get_shape(shape)[0] for shape in new.inputs]
    first, second = (
        new("Concat", new.constant([1] * (max(ranks) - rank), np.int64), whole, axis=0)
        for rank, whole in zip(ranks, sizes, strict=True)
    )
    shape = new("Where", new("Equal", first, new.constant(1, np.int64)), second, first)
    new.becomes(new("Cast", shape, to=node.graph.get_dtype(node.output[0])))


@translates("Erfinv")
def _erfinv(new: Replacement, _: Nodes) -> None:
    """Giles' two polynomials; at −1 and 1 it is infinite."""
    (x,) = new.inputs
    dtype = new.datatype(x)
    one = new.constant(1, dtype)
    depth = new("Neg", new("Log", new("Mul", new("Sub", one, x), new("Add", one, x))))

    def polynomial(variable: str, coefficients: tuple[float, ...]) -> str:
        value = new.constant(coefficients[0], dtype)
        for coefficient in coefficients[1:]:
            value = new("Add", new("Mul", value, variable), new.constant(coefficient, dtype))
        return value

    near = polynomial(new("Sub", depth, new.constant(2.5, dtype)), _ERFINV_NEAR)
    far = polynomial(new("Sub", new("Sqrt", depth), new.constant(3, dtype)), _ERFINV_FAR)
    inside = new("Mul", x, new("Where", new("Less", depth, new.constant(5, dtype)), near, far))
    at_the_end = new("Equal", new("Abs", x), one)
    new.becomes(new("Where", at_the_end, new("Mul", x, new.constant(np.inf, dtype)), inside))


@translates("LowerBound", "UpperBound")
def _bound(new: Replacement, node: Nodes) -> None:
    """How many of a sorted row are below each value, or not above it. NaN is above none, as in a binary search."""
    row = new("Unsqueeze", new.inputs[0], new.constant([1], np.int64))
    values = new("Unsqueeze", new.inputs[1], new.constant([2], np.int64))
    passed = new("Less", row, values) if node.type == "LowerBound" else new("Not", new("Less", values, row))
    count = new("ReduceSum", new("Cast", passed, to=TensorProto.INT32), new.constant([-1], np.int64), keepdims=0)
    new.becomes(new("Cast", count, to=node.graph.get_dtype(node.output[0])))


@translates("XlaDynamicUpdateSlice")
def _updated_slice(new: Replacement, node: Nodes) -> None:
    """The update is padded to the whole; where it is not, the whole stays. It begins where it still fits."""
    whole, update, start = new.inputs
    size, covered = new("Shape", whole), new("Shape", update)
    room = new("Sub", size, covered)
    start = new("Min", new("Max", new("Cast", start, to=TensorProto.INT64), new.constant(0, np.int64)), room)
    pads = new("Concat", start, new("Sub", room, start), axis=0)
    ones = new("Expand", new.constant(1, np.int32), covered)
    is_updated = new("Cast", new("Pad", ones, pads), to=TensorProto.BOOL)
    new.becomes(new("Where", is_updated, new("Pad", update, pads), whole))
