"""The models that are measured, written as ONNX graphs with random weights (the forest alone has learnt something).

A folder that each `build` fills has Triton's layout, so that it is a server's whole repository:
`<repository>/<model>/1/model.onnx`. Every input and output begins with the dynamic axis `batch`.
"""

import hashlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from tests.benchmarks.harness import CACHE, step

FP32, INT64 = TensorProto.FLOAT, TensorProto.INT64

# What ONNX Runtime and converters in use today read.
IR_VERSION, OPSET, ML_OPSET = 10, 20, 3

TOKENS, VOCABULARY = 128, 30522
TEXT_LENGTH, TEXT_VOCABULARY = 100, 20000
# 500 MB of FP32.
WEIGHTY_WIDTH, WEIGHTY_LAYERS = 5000, 5
# 16 MB of FP32 a row.
ECHO_WIDTH = 4 << 20


@dataclass(frozen=True)
class Model:
    """A built model: its repository, and one row to ask it with."""

    name: str
    repository: Path
    row: dict[str, np.ndarray]

    @property
    def path(self) -> Path:
        return self.repository / self.name / "1" / "model.onnx"


class Graph:
    """Collects nodes and weights; every method that adds something returns its name."""

    def __init__(self, seed: int = 0) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self.random = np.random.default_rng(seed)

    def const(self, array: np.ndarray) -> str:
        name = f"w{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.asarray(array, order="C"), name))
        return name

    def normal(self, *shape: int, scale: float) -> str:
        return self.const(self.random.standard_normal(shape, dtype=np.float32) * np.float32(scale))

    def op(self, kind: str, *inputs: str, output: str = "", **attributes: object) -> str:
        name = output or f"n{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, inputs, [name], name=f"{kind}_{len(self.nodes)}", **attributes))
        return name

    def dense(self, x: str, inputs: int, outputs: int, output: str = "") -> str:
        """The last axis of `x` times a matrix, plus a bias."""
        product = self.op("MatMul", x, self.normal(inputs, outputs, scale=inputs**-0.5))
        return self.op("Add", product, self.normal(outputs, scale=0.01), output=output)

    def save(self, path: Path, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> None:
        graph = helper.make_graph(self.nodes, path.parent.parent.name, inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", OPSET), helper.make_opsetid("ai.onnx.ml", ML_OPSET)]
        onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION), path)


def tensor(name: str, kind: int, *shape: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, ["batch", *shape])


def mlp(path: Path) -> dict[str, np.ndarray]:
    """784-128-128-10, ReLU, softmax."""
    graph = Graph()
    x = "pixels"
    for inputs, outputs in ((784, 128), (128, 128)):
        x = graph.op("Relu", graph.dense(x, inputs, outputs))
    graph.op("Softmax", graph.dense(x, 128, 10), output="probabilities", axis=-1)
    graph.save(path, [tensor("pixels", FP32, 784)], [tensor("probabilities", FP32, 10)])
    return {"pixels": graph.random.random((1, 784), dtype=np.float32)}


def lstm(path: Path) -> dict[str, np.ndarray]:
    """A text classifier: embedding of 10, LSTM of 10, one sigmoid."""
    graph, size = Graph(), 10
    embedded = graph.op("Gather", graph.normal(TEXT_VOCABULARY, size, scale=0.5), "tokens")
    by_time = graph.op("Transpose", embedded, perm=[1, 0, 2])
    weights = [graph.normal(1, 4 * size, size, scale=0.3) for _ in range(2)]
    bias = graph.normal(1, 8 * size, scale=0.1)
    graph.nodes.append(helper.make_node("LSTM", [by_time, *weights, bias], ["", "last"], name="LSTM", hidden_size=size))
    hidden = graph.op("Squeeze", "last", graph.const(np.array([0], np.int64)))
    graph.op("Sigmoid", graph.dense(hidden, size, 1), output="score")
    graph.save(path, [tensor("tokens", INT64, TEXT_LENGTH)], [tensor("score", FP32, 1)])
    return {"tokens": graph.random.integers(0, TEXT_VOCABULARY, (1, TEXT_LENGTH))}


def forest(path: Path) -> dict[str, np.ndarray]:
    """100 trees that scikit-learn grew on its handwritten digits."""
    from sklearn.datasets import load_digits
    from sklearn.ensemble import RandomForestClassifier

    digits = load_digits()
    trained = RandomForestClassifier(n_estimators=100, random_state=0).fit(digits.data, digits.target)
    names = ("treeids", "nodeids", "featureids", "modes", "values", "truenodeids", "falsenodeids")
    nodes: dict[str, list] = {f"nodes_{name}": [] for name in names}
    leaves: dict[str, list] = {f"class_{name}": [] for name in ("treeids", "nodeids", "ids", "weights")}
    for number, tree in enumerate(estimator.tree_ for estimator in trained.estimators_):
        leaf = tree.children_left < 0
        columns = (
            [number] * tree.node_count,
            range(tree.node_count),
            np.where(leaf, 0, tree.feature),
            np.where(leaf, "LEAF", "BRANCH_LEQ"),
            np.where(leaf, 0.0, tree.threshold),
            np.where(leaf, 0, tree.children_left),
            np.where(leaf, 0, tree.children_right),
        )
        for values, column in zip(nodes.values(), columns, strict=True):
            values.extend(np.asarray(column).tolist())
        shares = tree.value[:, 0, :] / len(trained.estimators_)
        at, labels = np.nonzero(shares * leaf[:, None])
        for values, column in zip(leaves.values(), ([number] * len(at), at, labels, shares[at, labels]), strict=True):
            values.extend(np.asarray(column).tolist())
    graph = Graph()
    ensemble = helper.make_node(
        "TreeEnsembleClassifier",
        ["features"],
        ["label", "probabilities"],
        name="forest",
        domain="ai.onnx.ml",
        classlabels_int64s=list(range(10)),
        post_transform="NONE",
        **nodes,
        **leaves,
    )
    graph.nodes.append(ensemble)
    graph.save(path, [tensor("features", FP32, 64)], [tensor("label", INT64), tensor("probabilities", FP32, 10)])
    return {"features": digits.data[:1].astype(np.float32)}


def resnet50(path: Path) -> dict[str, np.ndarray]:
    """ResNet-50 v1.5 at 224 × 224, its batch normalisation folded into the convolutions."""
    graph = Graph()

    def conv(x: str, inputs: int, outputs: int, size: int, *, stride: int = 1, scale: float = 1.0) -> str:
        weight = graph.normal(outputs, inputs, size, size, scale=scale * (2 / (inputs * size * size)) ** 0.5)
        pads = [size // 2] * 4
        strides = [stride] * 2
        return graph.op("Conv", x, weight, graph.normal(outputs, scale=0.01), pads=pads, strides=strides)

    x = graph.op("Relu", conv("image", 3, 64, 7, stride=2))
    x = graph.op("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = 64
    for stage, blocks in enumerate((3, 4, 6, 3)):
        width = 64 << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            shortcut = conv(x, channels, 4 * width, 1, stride=stride) if not block else x
            y = graph.op("Relu", conv(x, channels, width, 1))
            y = graph.op("Relu", conv(y, width, width, 3, stride=stride))
            # A small last convolution keeps sixteen sums of random blocks from growing without bound.
            x = graph.op("Relu", graph.op("Add", conv(y, width, 4 * width, 1, scale=0.2), shortcut))
            channels = 4 * width
    x = graph.op("Flatten", graph.op("GlobalAveragePool", x))
    graph.dense(x, channels, 1000, output="logits")
    graph.save(path, [tensor("image", FP32, 3, 224, 224)], [tensor("logits", FP32, 1000)])
    return {"image": graph.random.random((1, 3, 224, 224), dtype=np.float32)}


def bert(path: Path) -> dict[str, np.ndarray]:
    """An encoder of BERT-base's size: 12 layers of 768, 12 heads, 128 tokens; a pooled vector of 768."""
    graph, width, heads = Graph(), 768, 12
    split = graph.const(np.array([0, 0, heads, width // heads], np.int64))
    merge = graph.const(np.array([0, 0, width], np.int64))
    scale = graph.const(np.float32((width // heads) ** -0.5))

    def norm(x: str) -> str:
        ones, zeros = graph.const(np.ones(width, np.float32)), graph.const(np.zeros(width, np.float32))
        return graph.op("LayerNormalization", x, ones, zeros, axis=-1, epsilon=1e-12)

    def head(x: str, perm: Sequence[int]) -> str:
        return graph.op("Transpose", graph.op("Reshape", graph.dense(x, width, width), split), perm=list(perm))

    words = graph.op("Gather", graph.normal(VOCABULARY, width, scale=0.02), "input_ids")
    x = norm(graph.op("Add", words, graph.normal(1, TOKENS, width, scale=0.02)))
    mask = graph.op("Unsqueeze", "attention_mask", graph.const(np.array([1, 2], np.int64)))
    absent = graph.op("Sub", graph.const(np.float32(1)), graph.op("Cast", mask, to=FP32))
    penalty = graph.op("Mul", absent, graph.const(np.float32(-10000)))
    for _ in range(12):
        query, key, value = head(x, (0, 2, 1, 3)), head(x, (0, 2, 3, 1)), head(x, (0, 2, 1, 3))
        scores = graph.op("Add", graph.op("Mul", graph.op("MatMul", query, key), scale), penalty)
        mixed = graph.op("MatMul", graph.op("Softmax", scores, axis=-1), value)
        mixed = graph.op("Reshape", graph.op("Transpose", mixed, perm=[0, 2, 1, 3]), merge)
        x = norm(graph.op("Add", x, graph.dense(mixed, width, width)))
        wide = graph.op("Gelu", graph.dense(x, width, 4 * width))
        x = norm(graph.op("Add", x, graph.dense(wide, 4 * width, width)))
    first = graph.op("Gather", x, graph.const(np.array(0, np.int64)), axis=1)
    graph.op("Tanh", graph.dense(first, width, width), output="pooled")
    inputs = [tensor("input_ids", INT64, TOKENS), tensor("attention_mask", INT64, TOKENS)]
    graph.save(path, inputs, [tensor("pooled", FP32, width)])
    tokens = graph.random.integers(0, VOCABULARY, (1, TOKENS))
    return {"input_ids": tokens, "attention_mask": np.ones((1, TOKENS), np.int64)}


def echo(path: Path) -> dict[str, np.ndarray]:
    """Answers its input, 16 MB of it: what is left is copying."""
    graph = Graph()
    graph.op("Identity", "x", output="y")
    graph.save(path, [tensor("x", FP32, ECHO_WIDTH)], [tensor("y", FP32, ECHO_WIDTH)])
    return {"x": graph.random.random((1, ECHO_WIDTH), dtype=np.float32)}


def weighty(path: Path) -> dict[str, np.ndarray]:
    """Five matrices of 100 MB: what takes time is to load it."""
    graph = Graph()
    x = "x"
    for layer in range(WEIGHTY_LAYERS):
        x = graph.dense(x, WEIGHTY_WIDTH, WEIGHTY_WIDTH, output="y" if layer == WEIGHTY_LAYERS - 1 else "")
    graph.save(path, [tensor("x", FP32, WEIGHTY_WIDTH)], [tensor("y", FP32, WEIGHTY_WIDTH)])
    return {"x": graph.random.random((1, WEIGHTY_WIDTH), dtype=np.float32)}


BUILDERS: dict[str, Callable[[Path], dict[str, np.ndarray]]] = {
    build.__name__: build for build in (mlp, lstm, forest, resnet50, bert, echo, weighty)
}


def model(name: str) -> Model:
    """The model of that name, built once for each state of this file."""
    key = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    folder = CACHE / "models" / key
    for old in folder.parent.glob("*"):
        if old != folder:
            shutil.rmtree(old)
    repository, row = folder / name, folder / f"{name}.npz"
    if not row.exists():
        step(f"writing the model {name}")
        path = Model(name, repository, {}).path
        path.parent.mkdir(parents=True, exist_ok=True)
        # The row is written last, so that a model with a row is whole.
        np.savez(row, **BUILDERS[name](path))
    with np.load(row) as arrays:
        return Model(name, repository, dict(arrays))
