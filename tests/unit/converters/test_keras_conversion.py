"""Each case is a small model and the signature, or the refusal, that is expected of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from penstock.converters import (
    ConversionError,
    GateError,
    InvalidSamplesError,
    Tolerance,
    UnsupportedModelError,
    convert,
    read_signature,
)
from penstock.converters.conversion import _quiet_tensorflow

_quiet_tensorflow()
keras = pytest.importorskip("keras")
layers = keras.layers
Model = Any  # Keras publishes no types

# Keras reads its variables with numpy.array, which NumPy 2 warns of; only saving does so, not converting.
pytestmark = [
    pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"),
    # TensorFlow's AutoGraph builds syntax trees in a way that Python 3.13 deprecates.
    pytest.mark.filterwarnings("ignore:.*got an unexpected keyword argument .___pyct_anno:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def _fresh_names() -> None:
    keras.utils.clear_session()
    keras.utils.set_random_seed(7)


def classifier() -> Model:
    return keras.Sequential(
        [
            keras.Input((8,), name="features"),
            layers.Dense(16, activation="relu"),
            layers.Dense(3, activation="softmax", name="scores"),
        ]
    )


def automatic_names() -> Model:
    return keras.Sequential([keras.Input((8,)), layers.Dense(2)])


def image() -> Model:
    return keras.Sequential(
        [
            keras.Input((16, 16, 3), name="image"),
            layers.RandomFlip(),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.MaxPooling2D(),
            layers.Dropout(0.5),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2, name="logits"),
        ]
    )


def image_of_any_size() -> Model:
    return keras.Sequential(
        [
            keras.Input((None, None, 3), name="image"),
            layers.Conv2D(2, 3, padding="same"),
            layers.MaxPooling2D(name="half"),
        ]
    )


def series() -> Model:
    return keras.Sequential(
        [keras.Input((None, 4), name="steps"), layers.LSTM(6, return_sequences=True), layers.LSTM(5, name="state")]
    )


def masked_series() -> Model:
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="tokens"),
            layers.Embedding(20, 4, mask_zero=True),
            layers.GRU(5, name="state"),
        ]
    )


def tokens() -> Model:
    return keras.Sequential(
        [
            keras.Input((None,), dtype="int32", name="tokens"),
            layers.Embedding(20, 6),
            layers.GlobalAveragePooling1D(),
            layers.Dense(2, name="logits"),
        ]
    )


def several() -> Model:
    zeta, alpha = keras.Input((4,), name="zeta"), keras.Input((3,), name="alpha")
    joined = layers.Concatenate()([zeta, alpha])
    return keras.Model([zeta, alpha], [layers.Dense(2, name="second")(joined), layers.Dense(1, name="first")(joined)])


def dictionaries() -> Model:
    zeta, alpha = keras.Input((4,), name="zeta"), keras.Input((3,), name="alpha")
    joined = layers.Concatenate()([zeta, alpha])
    outputs = {"price": layers.Dense(2)(joined), "area": layers.Dense(1)(joined), "doubled": joined * 2}
    return keras.Model({"zeta": zeta, "alpha": alpha}, outputs)


def one_tensor_twice_and_an_input() -> Model:
    start = keras.Input((4,), name="a")
    end = layers.Dense(3, name="d")(start)
    return keras.Model(start, [end, end, start])


def layer_named_like_a_node() -> Model:
    start = keras.Input((4,), name="MatMul")
    return keras.Model(start, layers.Dense(3, name="const")(layers.Dense(4)(start)), name="model")


def question_and_answer() -> Model:
    question, answer = keras.Input((None, 8), name="question"), keras.Input((None, 8), name="answer")
    return keras.Model([question, answer], layers.Attention(name="attention")([question, answer]))


def text_and_mask() -> Model:
    text, mask = keras.Input((None, 8), name="text"), keras.Input((None, 8), name="mask")
    return keras.Model([text, mask], layers.Dense(2, name="out")(text * mask))


def normalized() -> Model:
    normalization = layers.Normalization(name="norm")
    normalization.adapt(np.arange(24, dtype="float32").reshape(3, 8))
    return keras.Sequential([keras.Input((8,), name="x"), normalization, layers.Dense(2, name="y")])


def nested() -> Model:
    return keras.Sequential([keras.Input((8,), name="x"), classifier(), layers.Dense(2, name="y")])


def exact_gelu() -> Model:
    return keras.Sequential([keras.Input((8,)), layers.Dense(4, activation="gelu", name="curve")])


def grouped_convolution() -> Model:
    return keras.Sequential([keras.Input((16, 16, 4)), layers.Conv2D(4, 3, groups=2, name="grouped")])


def sentences() -> Model:
    """Chinese text by its characters, and what a category is called."""
    text, number = keras.Input((), dtype="string", name="text"), keras.Input((1,), dtype="int64", name="number")
    characters = layers.TextVectorization(
        vocabulary=["你", "好"], split="character", output_sequence_length=3, name="characters"
    )
    name = layers.StringLookup(vocabulary=["red", "green"], invert=True, name="name")
    return keras.Model([text, number], [characters(text), name(number)])


CONVERTED: list[tuple[Callable[[], Model], list[str], list[str]]] = [
    (classifier, ["features FP32 [batch, 8]"], ["scores FP32 [batch, 3]"]),
    (automatic_names, ["input_layer FP32 [batch, 8]"], ["dense FP32 [batch, 2]"]),
    (image, ["image FP32 [batch, 16, 16, 3]"], ["logits FP32 [batch, 2]"]),
    (image_of_any_size, ["image FP32 [batch, height, width, 3]"], ["half FP32 [batch, half_axis_1, half_axis_2, 2]"]),
    (series, ["steps FP32 [batch, sequence, 4]"], ["state FP32 [batch, 5]"]),
    (masked_series, ["tokens INT32 [batch, sequence]"], ["state FP32 [batch, 5]"]),
    (tokens, ["tokens INT32 [batch, sequence]"], ["logits FP32 [batch, 2]"]),
    (several, ["zeta FP32 [batch, 4]", "alpha FP32 [batch, 3]"], ["second FP32 [batch, 2]", "first FP32 [batch, 1]"]),
    (
        dictionaries,
        ["zeta FP32 [batch, 4]", "alpha FP32 [batch, 3]"],
        ["price FP32 [batch, 2]", "area FP32 [batch, 1]", "doubled FP32 [batch, 7]"],
    ),
    (
        one_tensor_twice_and_an_input,
        ["a FP32 [batch, 4]"],
        ["d FP32 [batch, 3]", "d_1 FP32 [batch, 3]", "a_1 FP32 [batch, 4]"],
    ),
    (layer_named_like_a_node, ["MatMul FP32 [batch, 4]"], ["const FP32 [batch, 3]"]),
    (
        question_and_answer,
        ["question FP32 [batch, question_sequence, 8]", "answer FP32 [batch, answer_sequence, 8]"],
        ["attention FP32 [batch, question_sequence, 8]"],
    ),
    (
        text_and_mask,
        ["text FP32 [batch, sequence, 8]", "mask FP32 [batch, sequence, 8]"],
        ["out FP32 [batch, sequence, 2]"],
    ),
    (normalized, ["x FP32 [batch, 8]"], ["y FP32 [batch, 2]"]),
    (nested, ["x FP32 [batch, 8]"], ["y FP32 [batch, 2]"]),
    (exact_gelu, ["input_layer FP32 [batch, 8]"], ["curve FP32 [batch, 4]"]),
    (grouped_convolution, ["input_layer FP32 [batch, 16, 16, 4]"], ["grouped FP32 [batch, 14, 14, 4]"]),
    (
        sentences,
        ["text BYTES [batch]", "number INT64 [batch, 1]"],
        ["characters INT64 [batch, 3]", "name BYTES [batch, 1]"],
    ),
]


@pytest.mark.parametrize(("build", "inputs", "outputs"), CONVERTED, ids=[case[0].__name__ for case in CONVERTED])
def test_converts(build: Callable[[], Model], inputs: list[str], outputs: list[str], tmp_path: Path) -> None:
    model = build()
    path = tmp_path / "model.onnx"
    conversion = convert(model, path)
    assert [str(spec) for spec in conversion.signature.inputs] == inputs
    assert [str(spec) for spec in conversion.signature.outputs] == outputs
    assert read_signature(path) == conversion.signature
    sizes = [(case.output, case.rows, case.batch_size) for case in conversion.parity.cases]
    names = [spec.name for spec in conversion.signature.outputs]
    random = [case for case in sizes if case[1] == "random"]
    assert random == [(name, "random", size) for size in (1, 2, 7, 32) for name in names]
    skipped = {kind.rows for kind in conversion.parity.skipped}
    assert {rows for _, rows, _ in sizes} | skipped >= {"random", "empty"}
    # Whatever the rows, they were compared on every output or on none.
    assert sizes == [(name, rows, size) for rows, size in dict.fromkeys(case[1:] for case in sizes) for name in names]

    session = onnxruntime.InferenceSession(path)
    assert [value.name for value in session.get_inputs()] == [spec.name for spec in conversion.signature.inputs]
    assert [value.name for value in session.get_outputs()] == names
    text = onnx.printer.to_text(onnx.load(path))
    assert "keras_tensor" not in text
    assert "unk__" not in text

    first = path.read_bytes()
    convert(model, path)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_plain_lstm_becomes_the_lstm_operator(tmp_path: Path) -> None:
    convert(series(), tmp_path / "model.onnx")
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node]
    assert operators.count("LSTM") == 2
    assert "Loop" not in operators


def test_vocabularies_are_in_one_order(tmp_path: Path) -> None:
    words = keras.Input((1,), dtype="string", name="words")
    convert(keras.Model(words, layers.StringLookup(vocabulary=list("hdgaebfc"))(words)), tmp_path / "model.onnx")
    lookups = [node for node in onnx.load(tmp_path / "model.onnx").graph.node if node.op_type == "LabelEncoder"]
    keys = next(attribute.strings for attribute in lookups[0].attribute if attribute.name == "keys_strings")
    assert list(keys) == sorted(keys)


def test_sizes_that_keras_itself_takes_for_others_in_a_graph(tmp_path: Path) -> None:
    frames = keras.Input((None, 8, 8, 2), name="frames")
    model = keras.Model(frames, layers.TimeDistributed(layers.GlobalAveragePooling2D())(frames))
    with pytest.raises(GateError, match=r"differs|shape"):
        convert(model, tmp_path / "model.onnx")


def test_versions_are_pinned(tmp_path: Path) -> None:
    conversion = convert(classifier(), tmp_path / "model.onnx")
    model = onnx.load(tmp_path / "model.onnx")
    assert (conversion.opset, conversion.ir_version) == (18, 10)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    assert model.ir_version == 10
    assert conversion.size_bytes == (tmp_path / "model.onnx").stat().st_size


def test_samples_join_the_comparison(tmp_path: Path) -> None:
    rows = np.linspace(-3, 3, 8 * 300).reshape(300, 8)  # float64: cast to the model's float32
    conversion = convert(classifier(), tmp_path / "model.onnx", samples={"features": rows})
    sizes = [case.batch_size for case in conversion.parity.cases if case.rows == "sample"]
    assert sizes == [256, 44]
    assert all(case.argmax_agreement == 1.0 for case in conversion.parity.cases)


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({}, r"inputs \['features'\]"),
        ({"feature": np.zeros((2, 8))}, r"got \['feature'\]"),
        ({"features": np.zeros((2, 7))}, r"shape \[batch, 8\]; got \[2, 7\]"),
        ({"features": np.zeros((0, 8))}, "at least one"),
        ({"features": np.array([["a"] * 8])}, "type float32; got <U1"),
    ],
)
def test_samples_that_do_not_fit(samples: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSamplesError, match=message):
        convert(classifier(), tmp_path / "model.onnx", samples=samples)


@pytest.mark.parametrize(
    ("build", "compared", "skipped"),
    [
        (classifier, {"extreme", "empty"}, {"nan": "no number"}),
        (masked_series, {"padded"}, {"empty": "cannot run them", "integers": "is not in [0, "}),
        (series, {"extreme", "padded"}, {"nan": "no number", "empty": "fails on them"}),
        (normalized, {"extreme", "empty"}, {"nan": "no number"}),
    ],
)
def test_hard_rows(build: Callable[[], Model], compared: set[str], skipped: dict[str, str], tmp_path: Path) -> None:
    report = convert(build(), tmp_path / "model.onnx").parity
    assert {case.rows for case in report.cases} == compared | {"random"}
    assert {kind.rows for kind in report.skipped} == set(skipped)
    for kind in report.skipped:
        assert skipped[kind.rows] in kind.reason


def fixed_batch() -> Model:
    return keras.Sequential([keras.Input(batch_shape=(4, 8), name="x"), layers.Dense(2)])


def no_inputs() -> Model:
    return keras.Sequential([layers.Dense(2)])


def hashed() -> Model:
    return keras.Sequential([keras.Input((1,), dtype="string", name="text"), layers.Hashing(5, name="buckets")])


def grams_of_words() -> Model:
    text = keras.Input((1,), dtype="string", name="text")
    return keras.Model(text, layers.TextVectorization(vocabulary=["a b"], ngrams=2, name="grams")(text))


def fails_by_itself() -> Model:
    return keras.Sequential([keras.Input((None, 3)), layers.Reshape((5, 3)), layers.Flatten()])


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (hashed, "in 'buckets'.*StringLookup or IntegerLookup"),
        (fixed_batch, r"Input 'x' has the fixed shape \[4, 8\]"),
        (no_inputs, "does not say what its inputs are"),
        (grams_of_words, "layer 'grams' has ngrams=2"),
        (fails_by_itself, "fails on rows of its input shapes"),
        (object, "got object"),
    ],
)
def test_refuses(build: Callable[[], Model], message: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        convert(build(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
    assert not caplog.records


def test_failed_gate_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(GateError) as caught:
        convert(image(), path, tolerance=Tolerance(absolute=0, relative=0))
    assert caught.value.output == "logits"
    assert caught.value.row is not None
    assert caught.value.difference is not None
    assert 0 < caught.value.difference < 1e-3
    assert "'logits'" in str(caught.value)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_steps_are_announced_in_order(tmp_path: Path) -> None:
    steps: list[str] = []
    convert(classifier(), tmp_path / "model.onnx", on_step=steps.append)
    assert steps == ["load", "trace", "convert", "verify", "write"]


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="does not exist"):
        convert(classifier(), tmp_path / "nowhere" / "model.onnx")


def test_missing_source(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="No such file"):
        convert(tmp_path / "model.keras", tmp_path / "model.onnx")


def test_saved_file_converts_like_the_live_model(tmp_path: Path) -> None:
    model = dictionaries()
    model.compile("adam", "mse")
    model.save(tmp_path / "model.keras")
    live = convert(model, tmp_path / "live.onnx")
    saved = convert(tmp_path / "model.keras", tmp_path / "saved.onnx")
    assert saved.signature == live.signature
    assert saved.sha256 == live.sha256


def test_texts_in_and_scores_out(tmp_path: Path) -> None:
    """The words of a sentence, whatever their case and punctuation, as ONNX Runtime alone reads them."""
    text = keras.Input((1,), dtype="string", name="text")
    ids = layers.TextVectorization(vocabulary=["red", "dont", "blue"], name="ids")(text)
    convert(keras.Model(text, ids), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    rows = np.array([["Red, RED!"], ["don't\u000b blue?"], [""]], dtype=object)
    (answer,) = session.run(None, {"text": rows})
    assert answer.tolist() == [[2, 2], [3, 4], [0, 0]]


def test_samples_of_texts(tmp_path: Path) -> None:
    text = keras.Input((1,), dtype="string", name="text")
    model = keras.Model(text, layers.StringLookup(vocabulary=["a"], name="ids")(text))
    conversion = convert(model, tmp_path / "model.onnx", samples={"text": np.array([["a"], ["é"]])})
    assert conversion.parity.cases[-1].rows == "sample"
    with pytest.raises(InvalidSamplesError, match="'text' need the type string; got int64"):
        convert(model, tmp_path / "model.onnx", samples={"text": np.array([[1]])})


def tied() -> Model:
    """An embedding whose weight is the last product's, too, and layers that rearrange or only read theirs."""
    ids = keras.Input((6,), dtype="int32", name="ids")
    embedding = layers.ReversibleEmbedding(11, 8)
    rows = layers.LSTM(8, return_sequences=True)(layers.Conv1D(8, 3, padding="same")(embedding(ids)))
    return keras.Model(ids, embedding(layers.MultiHeadAttention(2, 4)(rows, rows), reverse=True))


def test_large_weights_pass_by_tensorflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from penstock.converters import tf2onnx_route
    from penstock.converters.keras_model import KerasModel

    model = tied()
    monkeypatch.setattr(tf2onnx_route, "_LARGE_BYTES", 1)
    traced = tf2onnx_route.trace(KerasModel(model))
    assert len(traced.weights) == 6
    # The LSTM's and the convolution's are rearranged, so they are constants.
    assert not {(8, 32), (3, 8, 8)} & {weight.shape for weight in traced.weights.values()}
    assert convert(model, tmp_path / "beside.onnx").parity.cases


def convolutions() -> Model:
    images = keras.Input((16, 16, 4))
    rows = layers.BatchNormalization()(layers.Conv2D(6, 3, padding="same", strides=2)(images))
    rows = layers.Conv2D(6, 3, groups=2, padding="same")(layers.Conv2D(6, 2, dilation_rate=2)(rows))
    rows = layers.DepthwiseConv2D(3, padding="same")(layers.SeparableConv2D(8, 3, padding="same")(rows))
    return keras.Model(images, layers.Conv2DTranspose(5, 3, strides=2, padding="same")(rows))


def convolutions_of_volumes() -> Model:
    volumes = keras.Input((8, 8, 8, 2))
    rows = layers.BatchNormalization()(layers.Conv3D(6, 3, padding="same", strides=2)(volumes))
    return keras.Model(volumes, layers.Conv3D(3, 2, dilation_rate=2)(rows))


@pytest.mark.parametrize("build", [convolutions, convolutions_of_volumes])
def test_kernels_that_pass_by_tensorflow(
    build: Callable[[], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from penstock.converters import tf2onnx_route

    model = build()
    for weight in model.weights:
        weight.assign(np.asarray(weight) + np.random.default_rng(7).normal(0, 0.1, weight.shape))
    monkeypatch.setattr(tf2onnx_route, "_LARGE_BYTES", 100)  # all but biases
    conversion = convert(model, tmp_path / "model.onnx")
    graph = onnx.load(conversion.path).graph
    operators = [node.op_type for node in graph.node]
    # One before and one behind: no kernel is transposed when the model runs.
    assert operators.count("Transpose") == 2
    assert "BatchNormalization" not in operators
    assert not {"Mul", "Squeeze"} & set(operators)
