"""What is refused is refused in the words of who built the model, and what only seemed to fail converts."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnxruntime
import pytest
from keras import layers, ops

from penstock.converters import UnsupportedModelError, convert
from penstock.converters.probe import probe
from penstock.converters.sources import open_source

Model = Any  # Keras publishes no types


class Counter(keras.Model):  # type: ignore[misc]  # Keras publishes no types
    def __init__(self) -> None:
        super().__init__(name="counter")
        self.count = self.add_weight(shape=(), initializer="zeros", trainable=False, name="count")

    def call(self, x: Any) -> Any:
        self.count.assign_add(1.0)
        return x + self.count


class Scan(keras.layers.Layer):  # type: ignore[misc]  # Keras publishes no types
    def call(self, x: Any) -> Any:
        steps = ops.transpose(x, (1, 0, 2))
        return ops.scan(lambda total, step: (total + step, total), ops.zeros_like(steps[0]), steps)[0]


def counter() -> Model:
    model = Counter()
    model(np.zeros((2, 3), np.float32))
    return model


def around(call: Callable[[Any], Any], *shape: int | None) -> Model:
    x = keras.Input(shape, name="x")
    return keras.Model(x, call(x))


def doubled(call: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Of a square matrix."""
    return lambda x: call(x + ops.transpose(x, (0, 2, 1)))


REFUSED: list[tuple[str, Callable[[], Model], str]] = [
    ("state", counter, "changes 'counter/count' as it answers.*no state"),
    ("scan", lambda: around(Scan(name="running"), 5, 3), "While in 'running'.*recurrent layers"),
    (
        "switch",
        lambda: around(lambda x: ops.switch(1, [ops.abs, ops.square], x), 4),
        "keras.ops.switch.*keras.ops.cond",
    ),
    ("eigh", lambda: around(doubled(ops.eigh), 3, 3), "keras.ops.eigh.*before the model is called"),
    ("inv", lambda: around(doubled(ops.inv), 3, 3), "keras.ops.inv.*before the model is called"),
    ("irfft", lambda: around(lambda x: ops.irfft((x, x)), 5), "keras.ops.irfft.*after the model was called"),
    (
        "associative_scan",
        lambda: around(lambda x: ops.associative_scan(ops.add, x, axis=1), 6),
        "tf2onnx cannot translate the model.*Use other layers",
    ),
    (
        "sizes",
        lambda: around(lambda x: layers.Flatten()(layers.Reshape((5, 3))(x)), None, 3),
        "fails on rows of its input shapes.*: .*[Rr]eshape.* Fix the model",
    ),
]


@pytest.mark.parametrize(("build", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_names_the_layer_or_the_operation(build: Callable[[], Model], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError) as caught:
        convert(build(), tmp_path / "model.onnx")
    text = str(caught.value)
    assert re.search(message, text), text
    assert "\n" not in text
    assert not re.search(r"bound method|make_sure|most recent call|please report", text, re.IGNORECASE)


def test_a_variable_that_no_answer_depends_on_may_change(tmp_path: Path) -> None:
    """The moving mean is updated, and the batch's own one counts."""
    convert(around(lambda x: layers.BatchNormalization()(x, training=True), 4), tmp_path / "model.onnx")


def test_no_mean_of_no_rows(tmp_path: Path) -> None:
    conversion = convert(around(lambda x: ops.mean(x, axis=0), 4), tmp_path / "model.onnx")
    assert {kind.rows: kind.reason for kind in conversion.parity.skipped}["empty"] == (
        "the source answers with no number"
    )


def test_mask_of_attention_has_the_size_of_the_sequence(tmp_path: Path) -> None:
    steps, mask = keras.Input((None, 8), name="steps"), keras.Input((None, None), dtype="bool", name="mask")
    attended = layers.MultiHeadAttention(2, 4, name="attended")(steps, steps, attention_mask=mask)
    signature = convert(keras.Model([steps, mask], attended), tmp_path / "model.onnx").signature
    assert [str(spec) for spec in (*signature.inputs, *signature.outputs)] == [
        "steps FP32 [batch, sequence, 8]",
        "mask BOOL [batch, sequence, sequence]",
        "attended FP32 [batch, sequence, 8]",
    ]


@pytest.mark.parametrize("size", [(17, 31), (5, 3), (30, 3), (20, 21), (64, 40)])
def test_images_smaller_than_a_crop_are_resized(size: tuple[int, int], tmp_path: Path) -> None:
    model = around(layers.CenterCrop(20, 21), None, None, 3)
    convert(model, tmp_path / "model.onnx")
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    (answer,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": images})
    np.testing.assert_allclose(answer, model(images), atol=1e-5)


def test_scores_of_attention_among_equal_steps() -> None:
    """Of large steps that are all the same, rounding alone says which has the score: each may move as far as any."""
    attention = layers.MultiHeadAttention(2, 4)
    model = around(lambda x: attention(x, x, return_attention_scores=True), 6, 8)
    batches = probe(open_source(model, None), None).batches
    (slack,) = [batch.slack[list(batch.answers)[1]] for batch in batches if batch.rows == "extreme"]
    moves = slack.max(axis=-1) > 1e-3 + slack[0].max()
    assert moves.any()
    assert (slack[moves].min(axis=-1) > 0.5 * slack[moves].max(axis=-1)).all()


@pytest.mark.parametrize("divisor", [0.3, -0.3])
def test_remainder_of_what_is_almost_a_multiple(divisor: float, tmp_path: Path) -> None:
    model = around(lambda x: ops.mod(x, divisor), 4)
    convert(model, tmp_path / "model.onnx")
    rows = np.array([[1.5, -1.5, 0.3, -0.3], [0.6, 0.9, 7.0, 0.0]], np.float32)
    (answer,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": rows})
    np.testing.assert_allclose(answer, model(rows), atol=1e-6)


@pytest.mark.parametrize("size", [(12, 12), (40, 48), (33, 7), (1, 1), (20, 24)])
def test_bicubic_resizing_to_more_and_to_fewer_pixels(size: tuple[int, int], tmp_path: Path) -> None:
    model = around(layers.Resizing(20, 24, interpolation="bicubic"), None, None, 3)
    convert(model, tmp_path / "model.onnx")
    images = np.random.default_rng(0).standard_normal((2, *size, 3)).astype(np.float32)
    (answer,) = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"x": images})
    np.testing.assert_allclose(answer, model(images), atol=1e-5)
