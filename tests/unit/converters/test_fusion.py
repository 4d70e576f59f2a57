"""Each pass on what tf2onnx makes of the layer it is for: fewer nodes, the same answers, and nothing where it must not.

`convert` compares the answers with Keras; here the graphs before and after the passes are compared too.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, parser

from penstock.converters import convert, fusion, optimize
from penstock.converters.conversion import _quiet_tensorflow

_quiet_tensorflow()
keras = pytest.importorskip("keras")
layers = keras.layers
Model = Any  # Keras publishes no types

# TensorFlow's AutoGraph builds syntax trees in a way that Python 3.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*got an unexpected keyword argument .___pyct_anno:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_names() -> None:
    keras.utils.clear_session()
    keras.utils.set_random_seed(7)


def _noisy(model: Model) -> Model:
    """No weight is zero or one: a bias that is lost or a scale that is ignored shows."""
    random = np.random.default_rng(7)
    for weight in model.weights:
        weight.assign(np.asarray(weight) + random.normal(0, 0.1, weight.shape))
    return model


def dense_on_three_axes(steps: int | None) -> Model:
    return keras.Sequential([keras.Input((steps, 6)), layers.Dense(5, activation="relu"), layers.Dense(3)])


def einsum_dense(steps: int | None) -> Model:
    return keras.Sequential(
        [
            keras.Input((steps, 6)),
            layers.EinsumDense("abc,cde->abde", (None, 2, 4), bias_axes="de"),
            layers.EinsumDense("abcd,cde->abe", (None, 5), bias_axes="e"),
        ]
    )


def layer_normalization(steps: int | None) -> Model:
    rows = keras.Input((steps, 6))
    outputs = [
        layers.LayerNormalization()(rows),
        layers.LayerNormalization(center=False)(rows),
        layers.LayerNormalization(scale=False, epsilon=0.1)(rows),
        layers.LayerNormalization(center=False, scale=False)(rows),
    ]
    return keras.Model(rows, outputs)


def rms_normalization(steps: int | None) -> Model:
    return keras.Sequential([keras.Input((steps, 6)), layers.RMSNormalization(epsilon=0.01)])


def self_attention(steps: int | None) -> Model:
    rows = keras.Input((steps, 8))
    return keras.Model(rows, layers.MultiHeadAttention(2, 3, value_dim=5)(rows, rows))


def causal_attention(steps: int | None) -> Model:
    rows = keras.Input((steps, 8))
    return keras.Model(rows, layers.MultiHeadAttention(2, 4)(rows, rows, use_causal_mask=True))


def masked_attention(steps: int | None) -> Model:
    """Random ids are 0 in every fifth place, so some rows look at nothing but what is masked."""
    ids = keras.Input((steps,), dtype="int32", name="ids")
    rows = layers.Embedding(5, 8, mask_zero=True)(ids)
    return keras.Model(ids, layers.MultiHeadAttention(2, 4)(rows, rows))


def given_mask(steps: int | None) -> Model:
    """One mask for all queries: its axis of one must become theirs."""
    rows, others = keras.Input((steps, 8), name="rows"), keras.Input((3, 6), name="others")
    mask = keras.Input((1, 3), dtype="bool", name="mask")
    return keras.Model([rows, others, mask], layers.MultiHeadAttention(2, 4)(rows, others, attention_mask=mask))


def cross_attention(steps: int | None) -> Model:
    rows, others = keras.Input((steps, 8), name="rows"), keras.Input((3, 6), name="others")
    return keras.Model([rows, others], layers.MultiHeadAttention(2, 4, output_shape=7)(rows, others))


def grouped_attention(steps: int | None) -> Model:
    rows = keras.Input((steps, 8))
    return keras.Model(rows, layers.GroupQueryAttention(3, 4, 2)(rows, rows, use_causal_mask=True))


def attention_by_operations(steps: int | None) -> Model:
    """Its scale is computed of a shape."""
    rows, others = keras.Input((steps, 2, 4), name="rows"), keras.Input((3, 2, 4), name="others")
    attended = keras.ops.dot_product_attention(rows, others, others)
    return keras.Model([rows, others], keras.ops.dot_product_attention(attended, others, others, is_causal=True))


def encoder(steps: int | None) -> Model:
    rows = keras.Input((steps, 8))
    attended = layers.LayerNormalization()(rows + layers.MultiHeadAttention(2, 4)(rows, rows))
    hidden = layers.Dense(16, activation=keras.activations.silu)(attended)
    return keras.Model(rows, layers.LayerNormalization()(attended + layers.Dense(8)(hidden)))


def exact_gelu(steps: int | None) -> Model:
    return keras.Sequential([keras.Input((steps, 6)), layers.Dense(5, activation="gelu")])


def approximate_gelu(steps: int | None) -> Model:
    return keras.Sequential([keras.Input((steps, 6)), layers.Activation(lambda x: keras.activations.gelu(x, True))])


def squeeze_and_excite(pixels: int | None) -> Model:
    """As in EfficientNet: the mean of an image weighs its channels."""
    images = keras.Input((pixels, pixels, 3))
    rows = layers.BatchNormalization()(layers.Conv2D(4, 3)(images))
    weights = layers.Reshape((1, 1, 4))(layers.GlobalAveragePooling2D()(rows))
    weighed = layers.multiply([rows, layers.Conv2D(4, 1, activation="sigmoid")(weights)])
    return keras.Model(images, [layers.GlobalAveragePooling2D(keepdims=True)(weighed), layers.Conv2D(2, 3)(weighed)])


# What must stand in the graph (of ours in all), and what must be gone.
CASES: list[tuple[Callable[[int | None], Model], dict[str, int], set[str]]] = [
    (dense_on_three_axes, {"MatMul": 2, "Add": 2, "Relu": 1}, {"Reshape", "Shape", "Concat"}),
    (exact_gelu, {"MatMul": 1, "Add": 1, "Gelu": 1}, {"Erf", "Mul"}),
    (approximate_gelu, {"FastGelu": 1}, {"Pow", "Tanh", "Mul"}),
    (
        squeeze_and_excite,
        {"Conv": 3, "GlobalAveragePool": 2, "Mul": 1},
        {"ReduceMean", "Reshape", "Add"},
    ),
    (einsum_dense, {"MatMul": 2, "Add": 2}, {"Einsum", "Reshape"}),
    (layer_normalization, {"LayerNormalization": 4}, {"ReduceMean", "Reciprocal", "Sub", "Mul", "Add"}),
    (rms_normalization, {"Div": 1, "Mul": 1, "ReduceMean": 1}, {"Reciprocal"}),
    (self_attention, {"MultiHeadAttention": 1, "MatMul": 4, "Add": 4}, {"Softmax", "Einsum", "Reshape"}),
    (causal_attention, {"MultiHeadAttention": 1, "MatMul": 4, "Where": 1}, {"Softmax", "Einsum"}),
    (masked_attention, {"MultiHeadAttention": 1, "MatMul": 4, "Where": 2}, {"Softmax", "Einsum"}),
    (given_mask, {"MultiHeadAttention": 1, "MatMul": 4, "Where": 1}, {"Softmax", "Einsum"}),
    (cross_attention, {"MultiHeadAttention": 1, "MatMul": 4, "Add": 4}, {"Softmax", "Einsum", "Reshape"}),
    (grouped_attention, {"MultiHeadAttention": 1, "MatMul": 4}, {"Softmax", "Einsum"}),
    (
        attention_by_operations,
        {"MultiHeadAttention": 2, "Where": 1},
        {"Softmax", "Einsum", "Sqrt", "Reciprocal"},
    ),
    (
        encoder,
        {"MultiHeadAttention": 1, "MatMul": 6, "LayerNormalization": 2, "Add": 8, "Sigmoid": 1, "Mul": 1},
        {"Einsum", "Reshape", "Shape"},
    ),
]


@pytest.mark.parametrize("steps", [None, 6])
@pytest.mark.parametrize(("build", "present", "absent"), CASES, ids=[case[0].__name__ for case in CASES])
def test_a_pass_leaves_few_nodes_and_the_same_answers(
    build: Callable[[int | None], Model],
    present: dict[str, int],
    absent: set[str],
    steps: int | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, path = _noisy(build(steps)), tmp_path / "model.onnx"
    convert(model, path)
    ours = onnx.load(path)
    operators = Counter(node.op_type for node in ours.graph.node)
    assert {name: operators[name] for name in present} == present
    assert not absent & set(operators)

    monkeypatch.setattr(fusion, "PASSES", ())
    convert(model, path)
    theirs = onnx.load(path)
    # Of sizes that are not known, some nodes more are about shapes.
    assert len(ours.graph.node) <= len(theirs.graph.node) or steps is None
    monkeypatch.undo()
    again = optimize(theirs)
    assert (again.graph.input, again.graph.output) == (theirs.graph.input, theirs.graph.output)
    assert _bytes(again) == _bytes(optimize(theirs)) == _bytes(ours)
    assert _bytes(optimize(again)) == _bytes(again)


_NORMALIZATION = """<ir_version: 8, opset_import: ["": {opset}]>
g (float[2, 2, 2] x) => (float[2, 2, 2] o) <float e = {{0.001}}, int64[1] last = {{-1}}, int64[1] first = {{1}}> {{
    m = {mean}
    d = Sub (x, m)
    q = Mul (d, d)
    v = {variance}
    a = Add (v, e)
    s = Sqrt (a)
    g1 = Reciprocal (s)
    l = Mul (x, g1)
    n = Neg (m)
    r = Mul (n, g1)
    o = Add (l, r)
}}"""


@pytest.mark.parametrize(
    "text",
    [
        # The convolution is an output, too.
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[2, 1, 3, 3] x) => (float[2, 1, 3, 3] c, float[2, 1, 3, 3] o)
          <float[1, 1, 1, 1] w = {2.0}, float[1] one = {1.0}> {
            c = Conv (x, w)
            o = BatchNormalization (c, one, one, one, one)
        }""",
        # The scores are an output, too.
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[2, 3, 2, 4] q, float[2, 3, 2, 4] k, float[2, 3, 2, 4] v)
          => (float[2, 3, 2, 4] o, float[2, 2, 3, 3] p) {
            s = Einsum <equation = "btnh,bsnh->bnts"> (q, k)
            p = Softmax <axis = -1> (s)
            o = Einsum <equation = "bnts,bsnh->btnh"> (p, v)
        }""",
        # Softmax over the queries.
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[2, 3, 2, 4] q, float[2, 3, 2, 4] k, float[2, 3, 2, 4] v) => (float[2, 3, 2, 4] o) {
            s = Einsum <equation = "btnh,bsnh->bnts"> (q, k)
            p = Softmax <axis = 2> (s)
            o = Einsum <equation = "bnts,bsnh->btnh"> (p, v)
        }""",
        # Double: the operator is for float32.
        """<ir_version: 10, opset_import: ["": 18]>
        g (double[2, 3, 2, 4] q, double[2, 3, 2, 4] k, double[2, 3, 2, 4] v) => (double[2, 3, 2, 4] o) {
            s = Einsum <equation = "btnh,bsnh->bnts"> (q, k)
            p = Softmax <axis = -1> (s)
            o = Einsum <equation = "bnts,bsnh->btnh"> (p, v)
        }""",
        # The weight is an input with a default, which a caller can replace.
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[2, 3, 2] x, float[2, 2] w) => (float[2, 3, 2] o) <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}> {
            o = Einsum <equation = "abc,cd->abd"> (x, w)
        }""",
        # A product whose rows are split otherwise than they came.
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[2, 3, 2] x) => (float[3, 2, 2] o)
          <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}, int64[2] flat = {-1, 2}, int64[3] sizes = {3, 2, 2}> {
            r = Reshape (x, flat)
            m = MatMul (r, w)
            o = Reshape (m, sizes)
        }""",
        # The mean of one axis, the variance of another.
        _NORMALIZATION.format(opset=18, mean="ReduceMean (x, last)", variance="ReduceMean (q, first)"),
        # Opset 16 has no LayerNormalization.
        _NORMALIZATION.format(opset=16, mean="ReduceMean <axes = [-1]> (x)", variance="ReduceMean <axes = [-1]> (q)"),
        # A constant of more axes gives the answer more.
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[2, 2] x) => (float[1, 2, 2] o)
          <float[1, 1, 1] half = {0.5}, float one = {1.0}, float root = {0.70710678}> {
            h = Mul (x, half)
            n = Neg (x)
            a = Mul (n, root)
            e = Erf (a)
            d = Sub (one, e)
            o = Mul (h, d)
        }""",
        # ONNX Runtime pools no integers.
        """<ir_version: 10, opset_import: ["": 18]>
        g (int32[2, 3, 4, 5] x) => (int32[2, 3] o) <int64[2] axes = {1, 2}> {
            t = Transpose <perm = [0, 2, 3, 1]> (x)
            o = ReduceMean <keepdims = 0> (t, axes)
        }""",
        # Opset 12 takes the Softmax over all axes from the second on.
        """<ir_version: 7, opset_import: ["": 12]>
        g (float[2, 2, 3, 4] q, float[2, 2, 4, 3] k, float[2, 2, 3, 4] v) => (float[2, 2, 3, 4] o) {
            s = MatMul (q, k)
            p = Softmax (s)
            o = MatMul (p, v)
        }""",
    ],
    ids=[
        "convolution-is-read",
        "scores-are-read",
        "softmax-axis",
        "double",
        "weight-is-an-input",
        "other-rows",
        "other-axis",
        "old-normalization",
        "wider-constant",
        "integers",
        "old-softmax",
    ],
)
def test_what_only_looks_like_it_stays(text: str) -> None:
    model = parser.parse_model(text)
    onnx.checker.check_model(model, full_check=True)
    ours = optimize(model)
    assert Counter(node.op_type for node in ours.graph.node) == Counter(node.op_type for node in model.graph.node)
    rows = _rows(model)
    for answer, expected in zip(_answers(ours, rows), _answers(model, rows), strict=True):
        np.testing.assert_array_equal(answer, expected)


_HEADS = """<ir_version: 10, opset_import: ["": 18]>
g (float[2, 3, 8] x, float[2, 1, 1, 3] bias, bool[2, 1, 3, 3] mask) => (float[2, 3, 8] o)
  <int64[4] parts = {0, 0, 2, 4}, int64[3] flat = {0, 0, 8}, float two = {2.0}, float half = {0.5}, float low = {-inf},
   float[2, 1, 1] each = {1.0, 2.0}> {
    h = Reshape (x, parts)
    q = Transpose <perm = [0, 2, 1, 3]> (h)
    v = Transpose <perm = [0, 2, 1, 3]> (h)
    %s
    p = Softmax <axis = -1> (m)
    a = MatMul (p, v)
    t = Transpose <perm = [0, 2, 1, 3]> (a)
    o = Reshape (t, flat)
}"""


@pytest.mark.parametrize(
    "scores",
    [
        # PyTorch's scaled_dot_product_attention: half of the scale on either side.
        """r = Mul (q, half)
           k = Transpose <perm = [0, 2, 3, 1]> (h)
           l = Mul (k, half)
           m = MatMul (r, l)""",
        # Keys transposed in two steps, the product divided, a bias that is the same for every query.
        """k = Transpose <perm = [0, 1, 3, 2]> (v)
           s = MatMul (q, k)
           d = Div (s, two)
           m = Add (d, bias)""",
        # masked_fill
        """k = Transpose <perm = [0, 2, 3, 1]> (h)
           s = MatMul (q, k)
           d = Mul (half, s)
           m = Where (mask, low, d)""",
        """k = Transpose <perm = [0, 2, 3, 1]> (h)
           s = MatMul (q, k)
           m = Where (mask, s, low)""",
    ],
    ids=["scaled", "divided-and-biased", "filled", "chosen"],
)
def test_attention_as_products(scores: str) -> None:
    model = parser.parse_model(_HEADS % scores)
    ours = optimize(model)
    operators = Counter(node.op_type for node in ours.graph.node)
    assert operators["MultiHeadAttention"] == 1
    assert not {"MatMul", "Softmax", "Transpose", "Div", "Mul"} & set(operators)
    # Each query has a key to look at, and another that is hidden.
    rows = _rows(model) | {"mask": np.broadcast_to(np.eye(3, dtype=bool), (2, 1, 3, 3))}
    np.testing.assert_allclose(_answers(ours, rows)[0], _answers(model, rows)[0], rtol=1e-5, atol=1e-6)
    assert _bytes(optimize(ours)) == _bytes(ours)


@pytest.mark.parametrize(
    "scores",
    [
        # A scale of each head's own.
        """k = Transpose <perm = [0, 2, 3, 1]> (h)
           s = MatMul (q, k)
           m = Mul (s, each)""",
        # One of the heads for all.
        """w = Constant <value = float[1, 1, 4, 3] {1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, 11.0, 12.0}> ()
           m = MatMul (q, w)""",
        # The scores are added to themselves.
        """k = Transpose <perm = [0, 2, 3, 1]> (h)
           s = MatMul (q, k)
           m = Add (s, s)""",
        # So low a number that it hides scores, and not so low that a row of nothing else forgets them.
        """k = Transpose <perm = [0, 2, 3, 1]> (h)
           s = MatMul (q, k)
           n = Constant <value = float {-10000000000.0}> ()
           m = Where (mask, s, n)""",
        # The scores are repeated for the bias.
        """k = Transpose <perm = [0, 2, 3, 1]> (h)
           s = MatMul (q, k)
           w = Constant <value = float[1, 2, 2, 1, 1] {1.0, 2.0, 3.0, 4.0}> ()
           m = Add (s, w)""",
    ],
    ids=["scale-of-heads", "other-batch", "added-twice", "forgetful-mask", "wider-bias"],
)
def test_products_that_only_look_like_attention(scores: str) -> None:
    operators = Counter(node.op_type for node in optimize(parser.parse_model(_HEADS % scores)).graph.node)
    assert operators["MatMul"] == 2
    assert not operators["MultiHeadAttention"]


def test_a_product_of_no_rows() -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[N, 2, 2] x) => (float[N, 1] o) <float[2, 2, 1] w = {1.0, 2.0, 3.0, 4.0}> {
            o = Einsum <equation = "abc,bcd->ad"> (x, w)
        }"""
    )
    ours = optimize(model)
    assert [node.op_type for node in ours.graph.node] == ["Reshape", "MatMul"]
    assert _answers(ours, {"x": np.zeros((0, 2, 2), np.float32)})[0].shape == (0, 1)


def test_batch_normalization_becomes_part_of_a_convolution() -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[2, 2, 3, 3] x) => (float[2, 2, 3, 3] o)
          <float[2, 2, 1, 1] w = {1.0, 2.0, 3.0, 4.0}, float[2] b = {0.1, 0.2}, float[2] scale = {1.5, 0.5},
           float[2] shift = {0.3, -0.2}, float[2] mean = {0.5, 2.0}, float[2] variance = {4.0, 0.25}> {
            c = Conv (x, w, b)
            n = BatchNormalization <epsilon = 0.001> (c, scale, shift, mean, variance)
            r = Relu (n)
            d = Conv (r, w)
            o = BatchNormalization (d, scale, shift, mean, variance)
        }"""
    )
    ours = optimize(model)
    assert [node.op_type for node in ours.graph.node] == ["Conv", "Relu", "Conv"]
    rows = _rows(model)
    np.testing.assert_allclose(_answers(ours, rows)[0], _answers(model, rows)[0], rtol=1e-5, atol=1e-6)


def test_a_weight_that_is_read_as_it_is_is_not_written_twice() -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]>
        g (int64[3] ids) => (float[3, 2] o) <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}> {
            x = Gather (w, ids)
            t = Transpose <perm = [1, 0]> (w)
            o = MatMul (x, t)
        }"""
    )
    ours = optimize(model)
    assert [constant.name for constant in ours.graph.initializer] == ["w"]
    assert [node.op_type for node in ours.graph.node] == ["Gather", "Transpose", "MatMul"]


def test_a_dead_end_is_in_no_ones_way() -> None:
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[2, 1, 3, 3] x) => (float[2, 1, 3, 3] o) <float[1, 1, 1, 1] w = {2.0}, float[1] one = {1.0}> {
            c = Conv (x, w)
            dead = Relu (c)
            o = BatchNormalization (c, one, one, one, one)
        }"""
    )
    assert [node.op_type for node in optimize(model).graph.node] == ["Conv"]


def test_dead_ends_go_and_bodies_keep_what_they_read() -> None:
    body = helper.make_graph(
        [helper.make_node("Add", ["x", "c"], ["y"])], "body", [], [helper.make_tensor_value_info("y", 1, [2])]
    )
    model = parser.parse_model(
        """<ir_version: 10, opset_import: ["": 18]>
        g (float[2] x, bool flag) => (float[2] o) <float[2] c = {1.0, 2.0}, float[2] unused = {1.0, 2.0}> {
            dead = Neg (x)
            o = Identity (x)
        }"""
    )
    del model.graph.node[1]
    model.graph.node.append(helper.make_node("If", ["flag"], ["o"], then_branch=body, else_branch=body))
    ours = optimize(model)
    assert [node.op_type for node in ours.graph.node] == ["If"]
    assert [constant.name for constant in ours.graph.initializer] == ["c"]


def _rows(model: onnx.ModelProto) -> dict[str, Any]:
    random = np.random.default_rng(7)
    constants = {constant.name for constant in model.graph.initializer}
    rows = {}
    for value in model.graph.input:
        if value.name not in constants:
            tensor = value.type.tensor_type
            shape = [axis.dim_value for axis in tensor.shape.dim]
            rows[value.name] = random.standard_normal(shape).astype(helper.tensor_dtype_to_np_dtype(tensor.elem_type))
    return rows


def _answers(model: onnx.ModelProto, rows: dict[str, Any]) -> list[Any]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, rows))


def _bytes(model: onnx.ModelProto) -> bytes:
    return bytes(model.SerializeToString(deterministic=True))
