"""The models of the benchmark: built here with random weights, as large as the ones people run."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from penstock.converters.variants import Form

# Not more than that: TensorFlow is measured as it comes.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
from keras import layers

Model = Any  # Keras publishes no types
TOKENS, WIDTH, HEADS, HIDDEN, DEPTH, WORDS = 128, 768, 12, 3072, 12, 30_000


@dataclass(frozen=True)
class Subject:
    """A model, how many rows a run has, and what it is to reach."""

    build: Callable[[], Model]
    rows: int
    # Its variant in 8 bits; ONNX Runtime has no such GRU.
    int8: Form | None
    # Times the rate of tf2onnx's own graph.
    fp32_aim: float
    int8_aim: float | None = None
    conversion_aim_s: float | None = None
    # The same architecture in PyTorch.
    pytorch: Literal["causal", "encoder"] | None = None


def transformer(*, causal: bool) -> Model:
    """Twelve layers, 768 wide, on 128 tokens, like BERT-base and GPT-2."""
    ids = keras.Input((TOKENS,), dtype="int32", name="ids")
    rows = layers.Embedding(WORDS, WIDTH)(ids)
    for _ in range(DEPTH):
        attended = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(rows, rows, use_causal_mask=causal)
        rows = layers.LayerNormalization(epsilon=1e-6)(rows + attended)
        hidden = layers.Dense(HIDDEN, activation=lambda x: keras.activations.gelu(x, approximate=True))(rows)
        rows = layers.LayerNormalization(epsilon=1e-6)(rows + layers.Dense(WIDTH)(hidden))
    return keras.Model(ids, rows)


def masked_lstm() -> Model:
    ids = keras.Input((128,), dtype="int32", name="ids")
    return keras.Model(ids, layers.LSTM(128)(layers.Embedding(1000, 64, mask_zero=True)(ids)))


def plain_gru() -> Model:
    rows = keras.Input((128, 64), name="rows")
    return keras.Model(rows, layers.GRU(128)(rows))


SUBJECTS = {
    "encoder": Subject(lambda: transformer(causal=False), 1, "int8", 1.15, 1.8, pytorch="encoder"),
    "decoder": Subject(lambda: transformer(causal=True), 1, "int8", 1.15, 1.8, pytorch="causal"),
    "masked-lstm": Subject(masked_lstm, 8, "int8", 3),
    "plain-gru": Subject(plain_gru, 8, None, 3),
    "plain-gru-one-row": Subject(plain_gru, 1, None, 3),
    "efficientnet-b0": Subject(
        lambda: keras.applications.EfficientNetB0(weights=None), 1, "int8-static", 1, conversion_aim_s=25
    ),
    "resnet-50": Subject(lambda: keras.applications.ResNet50(weights=None), 1, "int8-static", 1, conversion_aim_s=15),
}


def built(name: str) -> Model:
    """The same model in every process. As in a trained one, no bias is zero: such additions can be left out."""
    keras.utils.set_random_seed(7)
    model = SUBJECTS[name].build()
    random = np.random.default_rng(7)
    for weight in model.weights:
        if weight.dtype == "float32":
            weight.assign(weight.numpy() + random.normal(0, 0.02, weight.shape))
    return model


def rows_for(model: Model, size: int) -> Any:
    """Tokens padded at the end to lengths between a half and all, or normal numbers: always the same."""
    random = np.random.default_rng(7)
    shape = (size, *model.inputs[0].shape[1:])
    if model.inputs[0].dtype == "int32":
        lengths = random.integers(shape[1] // 2, shape[1] + 1, (size, 1))
        return np.where(np.arange(shape[1]) < lengths, random.integers(1, 1000, shape), 0).astype(np.int32)
    return random.standard_normal(shape).astype(np.float32)
