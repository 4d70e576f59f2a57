"""Small ONNX models, and the bundles and signatures they make."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from penstock.api.types.v1.signature_pb2 import Dimension, Signature, TensorSpec

FEATURES = 4

DATATYPES = {
    "BOOL": TensorProto.BOOL,
    "UINT8": TensorProto.UINT8,
    "UINT16": TensorProto.UINT16,
    "UINT32": TensorProto.UINT32,
    "UINT64": TensorProto.UINT64,
    "INT8": TensorProto.INT8,
    "INT16": TensorProto.INT16,
    "INT32": TensorProto.INT32,
    "INT64": TensorProto.INT64,
    "FP16": TensorProto.FLOAT16,
    "FP32": TensorProto.FLOAT,
    "FP64": TensorProto.DOUBLE,
    "BYTES": TensorProto.STRING,
    "BF16": TensorProto.BFLOAT16,
}
_NAMES = {number: name for name, number in DATATYPES.items()}

Axes = list[int | str]


@dataclass(frozen=True)
class Bundle:
    """The files of a version and its signature."""

    files: dict[str, bytes]
    signature: Signature


def value(name: str, datatype: str, axes: Axes) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, DATATYPES[datatype], axes)


def bundle_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, npt.NDArray[np.generic]] | None = None,
) -> Bundle:
    model = model_of(nodes, inputs, outputs, constants or {})
    signature = Signature(inputs=[_spec(one) for one in inputs], outputs=[_spec(one) for one in outputs])
    return Bundle({"model.onnx": model.SerializeToString()}, signature)


def model_of(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    constants: dict[str, npt.NDArray[np.generic]],
) -> onnx.ModelProto:
    initializers = [numpy_helper.from_array(array, name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "graph", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def scale(factor: float) -> Bundle:
    """`scaled` = `rows` × factor, [batch, 4]; `total` = the sum of each scaled row, [batch, 1]."""
    return bundle_of(
        [
            helper.make_node("Mul", ["rows", "factor"], ["scaled"]),
            helper.make_node("ReduceSum", ["scaled", "axes"], ["total"], keepdims=1),
        ],
        [value("rows", "FP32", ["batch", FEATURES])],
        [value("scaled", "FP32", ["batch", FEATURES]), value("total", "FP32", ["batch", 1])],
        {"factor": np.array(factor, np.float32), "axes": np.array([1], np.int64)},
    )


def identity(datatype: str, axes: Axes) -> Bundle:
    return bundle_of(
        [helper.make_node("Identity", ["given"], ["same"])],
        [value("given", datatype, axes)],
        [value("same", datatype, axes)],
    )


def pair(op: str = "Add") -> Bundle:
    """`result` = `left` op `right`, both [batch, sequence]."""
    axes: Axes = ["batch", "sequence"]
    return bundle_of(
        [helper.make_node(op, ["left", "right"], ["result"])],
        [value("left", "INT32", axes), value("right", "INT32", axes)],
        [value("result", "INT32", axes)],
    )


def lookup() -> Bundle:
    """`found` = ten times `index`, [batch]; an index outside −10 to 9 makes the run fail."""
    return bundle_of(
        [helper.make_node("Gather", ["table", "index"], ["found"])],
        [value("index", "INT64", ["batch"])],
        [value("found", "INT64", ["batch"])],
        {"table": np.arange(10, dtype=np.int64) * 10},
    )


def first_only() -> Bundle:
    """`found` = 5 for `index` 0, [batch]; a generated row of ones makes the run fail."""
    return bundle_of(
        [helper.make_node("Gather", ["table", "index"], ["found"])],
        [value("index", "INT64", ["batch"])],
        [value("found", "INT64", ["batch"])],
        {"table": np.array([5], np.int64)},
    )


def first_row() -> Bundle:
    """Claims a `first` for each row, [batch, 4], and gives one for all; the graph's own shapes do not show it."""
    axes: Axes = ["batch", FEATURES]
    return bundle_of(
        [helper.make_node("Compress", ["rows", "chosen"], ["first"], axis=0)],
        [value("rows", "FP32", axes)],
        [value("first", "FP32", axes)],
        {"chosen": np.array([True])},
    )


def with_external_weight(location: str, weight: npt.NDArray[np.float32]) -> Bundle:
    """`scale` by a weight of four that lies in another file of the bundle, or claims to."""
    axes: Axes = ["batch", FEATURES]
    inputs, outputs = [value("rows", "FP32", axes)], [value("scaled", "FP32", axes)]
    model = model_of([helper.make_node("Mul", ["rows", "weight"], ["scaled"])], inputs, outputs, {"weight": weight})
    tensor = model.graph.initializer[0]
    data = tensor.raw_data
    onnx.external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")
    signature = Signature(inputs=[_spec(inputs[0])], outputs=[_spec(outputs[0])])
    return Bundle({"model.onnx": model.SerializeToString(), "weights.bin": data}, signature)


def slow() -> Bundle:
    """`scaled` = `rows`, [batch, 4], after products of large matrices: some tens of milliseconds a run."""
    axes: Axes = ["batch", FEATURES]
    return bundle_of(
        [
            helper.make_node("ConstantOfShape", ["long"], ["wide"]),
            helper.make_node("ConstantOfShape", ["square"], ["matrix"]),
            helper.make_node("MatMul", ["rows", "wide"], ["product0"]),
            *(helper.make_node("MatMul", [f"product{i}", "matrix"], [f"product{i + 1}"]) for i in range(100)),
            helper.make_node("ReduceSum", ["product100", "axes"], ["zero"], keepdims=1),
            helper.make_node("Add", ["rows", "zero"], ["scaled"]),
        ],
        [value("rows", "FP32", axes)],
        [value("scaled", "FP32", axes)],
        {
            "long": np.array([FEATURES, 2000]),
            "square": np.array([2000, 2000]),
            "axes": np.array([1], np.int64),
        },
    )


def recurrent(op: str) -> Bundle:
    """`states` of an LSTM or GRU of four units, [batch, 1, sequence, 4], over `rows`, [batch, sequence, 2]."""
    gates = {"LSTM": 4, "GRU": 3}[op]
    weights = {"W": np.ones((1, 4 * gates, 2), np.float32), "R": np.ones((1, 4 * gates, 4), np.float32)}
    nodes = [
        helper.make_node("Transpose", ["rows"], ["steps"], perm=[1, 0, 2]),
        helper.make_node(op, ["steps", "W", "R"], ["all"], hidden_size=4),
        helper.make_node("Transpose", ["all"], ["states"], perm=[2, 1, 0, 3]),
    ]
    rows, states = value("rows", "FP32", ["batch", "sequence", 2]), value("states", "FP32", ["batch", 1, "sequence", 4])
    return bundle_of(nodes, [rows], [states], weights)


def with_config(bundle: Bundle, config: str) -> Bundle:
    """The bundle with a configuration of its own."""
    return Bundle({**bundle.files, "config.pbtxt": config.encode()}, bundle.signature)


def _spec(info: onnx.ValueInfoProto) -> TensorSpec:
    tensor = info.type.tensor_type
    shape = [
        Dimension(name=axis.dim_param) if axis.HasField("dim_param") else Dimension(size=axis.dim_value)
        for axis in tensor.shape.dim
    ]
    return TensorSpec(name=info.name, datatype=_NAMES[tensor.elem_type], shape=shape)
