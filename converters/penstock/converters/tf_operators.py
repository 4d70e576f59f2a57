"""TensorFlow operators that tf2onnx does not know, or translates wrongly: one function each, cases in the tests.

Importing this module adds them to tf2onnx's own table. tests/conformance/keras has the models that need each of them.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike
from onnx import TensorProto, helper
from tf2onnx import utils
from tf2onnx.handler import tf_op
from tf2onnx.onnx_opset.logical import Equal
from tf2onnx.onnx_opset.nn import ConvOp, ConvTranspose, MatrixBandPart

from penstock.converters.gate import RUNTIME_DOMAIN

OPSET = 18
"""From which opset on these serve: the one that graphs are exported at, so that they come before tf2onnx's own."""

Nodes = Any  # tf2onnx publishes no types


class Replacement:
    """Builds what stands in place of a node. Called with an operator and tensors, it gives the new tensor."""

    def __init__(self, graph: Nodes, node: Nodes) -> None:
        self._graph, self._node = graph, node
        self.inputs: list[str] = list(node.input)

    def __call__(self, operator: str, *inputs: str, domain: str = "", **attributes: Any) -> str:  # noqa: ANN401 as ONNX has it
        made = self._graph.make_node(
            operator, list(inputs), attr=attributes, domain=domain, op_name_scope=self._node.name
        )
        return str(made.output[0])

    def constant(self, value: ArrayLike, dtype: DTypeLike) -> str:
        name = utils.make_name(f"{self._node.name}/constant")
        return str(self._graph.make_const(name, np.asarray(value, dtype=dtype)).output[0])

    def joined(self, texts: str, start: str) -> str:
        """The texts of each row, one behind the other, behind those of `start`."""
        body = self._graph.create_new_graph_with_same_config()
        body.parent_graph = self._graph
        step, going, before = (utils.make_name(name) for name in ("step", "going", "before"))
        for name, datatype, shape in ((step, 7, []), (going, 9, []), (before, 8, [-1])):
            body.add_graph_input(name, datatype, shape)
        goes_on = body.make_node("Identity", [going]).output[0]
        column = body.make_node("Gather", [texts, step], attr={"axis": 1}).output[0]
        after = body.make_node("StringConcat", [before, column]).output[0]
        body.add_graph_output(goes_on, TensorProto.BOOL, [])
        body.add_graph_output(after, TensorProto.STRING, [-1])
        count = self("Gather", self("Shape", texts), self.constant(1, np.int64))
        loop = self._graph.make_node(
            "Loop",
            [count, self.constant(True, np.bool_), start],
            branches={"body": body},
            op_name_scope=self._node.name,
        )
        return str(loop.output[0])

    def tokens(self, text: str, **options: Any) -> str:  # noqa: ANN401 as ONNX has it
        """The parts of each text in a row of its own, padded with the empty string.

        ONNX knows nothing of ONNX Runtime's operator, and its checker crashes on a tensor whose type it does not know:
        the cast tells it.
        """
        parts = self("Tokenizer", text, domain=RUNTIME_DOMAIN, mark=0, mincharnum=1, pad_value="", **options)
        return self("Cast", parts, to=TensorProto.STRING)

    def datatype(self, tensor: str) -> Any:  # noqa: ANN401 one of numpy's
        return helper.tensor_dtype_to_np_dtype(self._graph.get_dtype(tensor))

    def becomes(self, tensor: str, output: int = 0) -> None:
        """The node's readers read this tensor from now on, which is of the same shape and datatype."""
        replaced = self._node.output[output]
        self._graph.copy_shape(replaced, tensor)
        self._graph.set_dtype(tensor, self._graph.get_dtype(replaced))
        self._graph.replace_all_inputs(replaced, tensor)
        self._graph.remove_node(self._node.name)


def translates(*operators: str) -> Callable[[Callable[[Replacement, Nodes], None]], Callable[..., None]]:
    def register(translate: Callable[[Replacement, Nodes], None]) -> Callable[..., None]:
        def handler(graph: Nodes, node: Nodes, **_: object) -> None:
            translate(Replacement(graph, node), node)

        tf_op.register_handler(handler, OPSET, list(operators), "", {})
        return handler

    return register


@translates("Erfc")
def _erfc(new: Replacement, _: Nodes) -> None:
    """1 − erf(x): exact to 5e-8, and what GELU multiplies it with is small where the relative error is not."""
    one = new.constant(1, new.datatype(new.inputs[0]))
    new.becomes(new("Sub", one, new("Erf", new.inputs[0])))


@translates("Expm1")
def _expm1(new: Replacement, _: Nodes) -> None:
    """exp(x) − 1 = tanh(x / 2) · (exp(x) + 1), which keeps its digits near 0."""
    (x,) = new.inputs
    one, two = (new.constant(number, new.datatype(x)) for number in (1, 2))
    new.becomes(new("Mul", new("Tanh", new("Div", x, two)), new("Add", new("Exp", x), one)))


@translates("Log1p")
def _log1p(new: Replacement, _: Nodes) -> None:
    """ln(1 + x), and near 0, where the sum loses digits, 2 · artanh(x / (x + 2))."""
    (x,) = new.inputs
    if new.datatype(x) != np.float32:  # ONNX Runtime has no other artanh
        new.becomes(new("Log", new("Add", x, new.constant(1, new.datatype(x)))))
        return
    one, two, half = (new.constant(number, new.datatype(x)) for number in (1, 2, 0.5))
    near = new("Mul", two, new("Atanh", new("Div", x, new("Add", x, two))))
    new.becomes(new("Where", new("Less", new("Abs", x), half), near, new("Log", new("Add", x, one))))


@translates("FloorDiv")
def _floor_division(new: Replacement, node: Nodes) -> None:
    x, y = new.inputs
    if np.issubdtype(new.datatype(x), np.integer):
        # ONNX divides integers towards zero; its Mod has the sign of the divisor.
        new.becomes(new("Div", new("Sub", x, new("Mod", x, y)), y))
    else:
        new.becomes(new("Floor", new("Div", x, y)))


@translates("FloorMod")
def _floor_remainder(new: Replacement, _: Nodes) -> None:
    x, y = new.inputs
    if np.issubdtype(new.datatype(x), np.integer):
        new.becomes(new("Mod", x, y))
        return
    # A remainder of the sign of x, exact; from x − floor(x / y) · y nothing may be left where x is almost a multiple.
    zero, remainder = new.constant(0, new.datatype(x)), new("Mod", x, y, fmod=1)
    is_other = new("Xor", new("Less", remainder, zero), new("Less", y, zero))
    is_some = new("Not", new("Equal", remainder, zero))
    new.becomes(new("Where", new("And", is_some, is_other), new("Add", remainder, y), remainder))


CHOSEN = {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT32, TensorProto.INT64, TensorProto.STRING}
"""ONNX Runtime has Where of these."""


@translates("SelectV2")
def _choice(new: Replacement, node: Nodes) -> None:
    """The chosen value alone: tf2onnx's sum of products would be NaN where the other one is."""
    condition, *values = new.inputs
    datatype = node.graph.get_dtype(node.output[0])
    if datatype not in CHOSEN:
        wider = TensorProto.FLOAT if new.datatype(values[0]).kind == "f" else TensorProto.INT64
        values = [new("Cast", value, to=wider) for value in values]
    chosen = new("Where", condition, *values)
    new.becomes(chosen if datatype in CHOSEN else new("Cast", chosen, to=datatype))


def _band(graph: Nodes, node: Nodes, **options: object) -> None:
    """The diagonals of a matrix from `lower` below to `upper` above, all of them if negative; zero beside them."""
    if graph.get_dtype(node.input[0]) not in {TensorProto.FLOAT, TensorProto.DOUBLE, TensorProto.INT64}:
        MatrixBandPart.version_11(graph, node, **options)  # it multiplies with zero, which is NaN of NaN
        return
    new = Replacement(graph, node)
    tensor, *bounds = new.inputs
    lower, upper = (int(graph.get_tensor_value(bound)) for bound in bounds)
    if upper >= 0:
        tensor = new("Trilu", tensor, new.constant(upper, np.int64), upper=0)
    if lower >= 0:
        tensor = new("Trilu", tensor, new.constant(-lower, np.int64), upper=1)
    new.becomes(tensor)


tf_op.register_handler(_band, OPSET, ["MatrixBandPart"], "", {})


@translates("Bitcast")
def _bits(new: Replacement, node: Nodes) -> None:
    """The sign bit alone, which is what Keras asks for: of zero, too, by the sign of its reciprocal."""
    readers = node.graph.find_output_consumers(node.output[0])
    if node.graph.get_dtype(node.output[0]) != TensorProto.INT32 or any(
        reader.type != "BitwiseAnd" for reader in readers
    ):
        raise ValueError("ONNX cannot read the bits of a number, apart from its sign")
    (x,) = new.inputs
    zero, one = (new.constant(number, new.datatype(x)) for number in (0, 1))
    lowest, none = (new.constant(number, np.int32) for number in (np.iinfo(np.int32).min, 0))
    is_negative = new("Or", new("Less", x, zero), new("Less", new("Div", one, x), zero))
    new.becomes(new("Where", is_negative, lowest, none))


@translates("DenseBincount")
def _bincount(new: Replacement, node: Nodes) -> None:
    """How often, or whether, each number below `size` stands in a row."""
    numbers, size, weights = new.inputs
    numbers, size = (new("Cast", tensor, to=TensorProto.INT64) for tensor in (numbers, size))
    # ONNX Runtime has OneHot of few datatypes.
    hits = new("OneHot", numbers, size, new.constant([0, 1], np.float32), axis=-1)
    if 0 not in (node.graph.get_shape(weights) or []):
        weights = new("Unsqueeze", new("Cast", weights, to=TensorProto.FLOAT), new.constant([-1], np.int64))
        hits = new("Where", new("Cast", hits, to=TensorProto.BOOL), weights, new.constant(0, np.float32))
    is_binary = node.get_attr_value("binary_output", default=False)
    counts = new("ReduceMax" if is_binary else "ReduceSum", hits, new.constant([-2], np.int64), keepdims=0)
    new.becomes(new("Cast", counts, to=node.graph.get_dtype(node.output[0])))


@translates("Bucketize")
def _bucketize(new: Replacement, node: Nodes) -> None:
    """How many boundaries are not above x. NaN is above none of them, and so in the last bucket, as in TensorFlow."""
    x = new("Cast", new.inputs[0], to=TensorProto.FLOAT)
    last = new.constant([-1], np.int64)
    boundaries = new.constant(list(node.get_attr("boundaries").floats), np.float32)
    reached = new("Not", new("Less", new("Unsqueeze", x, last), boundaries))
    new.becomes(new("ReduceSum", new("Cast", reached, to=TensorProto.INT32), last, keepdims=0))


def _convolution(graph: Nodes, node: Nodes, **options: object) -> None:
    """tf2onnx finds groups by the channels in two dimensions only."""
    channels, taken = graph.get_shape(node.input[0])[-1], graph.get_shape(node.input[1])[-2]
    ConvOp.version_13(graph, node, **options)
    if channels > 0:
        node.set_attr("group", channels // taken)


tf_op.register_handler(_convolution, OPSET, ["Conv3D"], "", {})


def _equal(graph: Nodes, node: Nodes, **options: object) -> None:
    """Of texts, too, which tf2onnx takes for numbers."""
    if graph.get_dtype(node.input[0]) != TensorProto.STRING:
        Equal.version_11(graph, node, **options)
        return
    new = Replacement(graph, node)
    is_equal = new("Equal", *new.inputs)
    new.becomes(is_equal if node.type == "Equal" else new("Not", is_equal))


tf_op.register_handler(_equal, OPSET, ["Equal", "NotEqual"], "", {})


def _transposed_convolution(graph: Nodes, node: Nodes, **options: object) -> None:
    """An output longer than the kernel reaches ends in zeros: ONNX has a word for it, negative padding is none."""
    is_valid = node.get_attr_value("padding") == b"VALID"
    ConvTranspose.version_11(graph, node, **options)
    if (attribute := node.get_attr("pads")) is None:
        return
    pads = list(attribute.ints)
    dimensions = len(pads) // 2
    total = [start + end for start, end in zip(pads[:dimensions], pads[dimensions:], strict=True)]
    if is_valid or min(total) < 0:
        starts = [0 if is_valid or both < 0 else start for both, start in zip(total, pads, strict=False)]
        ends = [max(both - start, 0) for both, start in zip(total, starts, strict=True)]
        node.set_attr("pads", starts + ends)
        node.set_attr("output_padding", [max(-both, 0) for both in total])


tf_op.register_handler(_transposed_convolution, OPSET, ["Conv2DBackpropInput", "Conv3DBackpropInputV2"], "", {})
