"""Half precision and quantized models: policies of datatypes, and `quantize`."""

import warnings
from collections.abc import Callable
from typing import Any

import keras
from keras import layers
from tests.conformance.keras.case import Case, Model, around


def _under(policy: str, build: Callable[[], Model]) -> Model:
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        return build()
    finally:
        keras.config.set_dtype_policy(before)


def _quantized(mode: str, build: Callable[[], Model]) -> Model:
    model = build()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Keras warns of each layer that has no such form
        model.quantize(mode)
    return model


def _classifier(last: str | None = None) -> Model:
    return keras.Sequential(
        [
            keras.Input((8,), name="features"),
            layers.Dense(16, activation="gelu"),
            layers.BatchNormalization(),
            layers.LayerNormalization(),
            layers.Dense(3, activation="softmax", dtype=last, name="scores"),
        ]
    )


def _one_layer() -> Model:
    return keras.Sequential([keras.Input((8,)), layers.Dense(16), layers.Dense(3, dtype="float16", name="half")])


def _images() -> Model:
    return keras.Sequential(
        [
            keras.Input((12, 12, 3), dtype="uint8", name="pixels"),
            layers.Resizing(16, 16),
            layers.Rescaling(1 / 255),
            layers.Conv2D(4, 3, activation="relu"),
            layers.BatchNormalization(),
            layers.DepthwiseConv2D(3),
            layers.MaxPooling2D(),
            layers.GlobalAveragePooling2D(),
            layers.Dense(2),
        ]
    )


def _series(layer: Callable[[Any], Any]) -> Model:
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    return keras.Model(tokens, layers.Dense(2)(layer(layers.Embedding(9, 8, mask_zero=True)(tokens))))


def _encoder() -> Model:
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    vectors = layers.Embedding(9, 8, mask_zero=True)(tokens)
    attended = layers.LayerNormalization()(layers.Add()([vectors, layers.MultiHeadAttention(2, 4)(vectors, vectors)]))
    return keras.Model(tokens, layers.Dense(2)(layers.GlobalAveragePooling1D()(attended)))


def _tied() -> Model:
    embedding = layers.ReversibleEmbedding(9, 8)
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    return keras.Model(tokens, embedding(embedding(tokens), reverse=True))


_MODELS = {
    "classifier": _classifier,
    "encoder": _encoder,
    "images of uint8": _images,
    "LSTM": lambda: _series(layers.LSTM(4)),
}


def _each(kind: str, how: Callable[[str, Callable[[], Model]], Model]) -> list[Case]:
    return [Case(f"{kind} ({name})", lambda build=build: how(kind, build)) for name, build in _MODELS.items()]


CASES = [
    *_each("mixed_float16", _under),
    Case("mixed_float16 (the last layer in float32)", lambda: _under("mixed_float16", lambda: _classifier("float32"))),
    Case("mixed_float16 (GRU)", lambda: _under("mixed_float16", lambda: _series(layers.GRU(4)))),
    Case("float16 (classifier)", lambda: _under("float16", _classifier)),
    Case("float16 (one layer)", _one_layer),
    Case(
        "mixed_bfloat16",
        lambda: _under("mixed_bfloat16", lambda: _classifier("float32")),
        refused="bfloat16.*dense",
        reason="ONNX Runtime has no bfloat16 on a CPU.",
    ),
    *_each("int8", _quantized),
    Case("int4 (classifier)", lambda: _quantized("int4", _classifier)),
    Case(
        "int8 (EinsumDense)",
        lambda: _quantized("int8", lambda: around(layers.EinsumDense("abc,cd->abd", (None, 3)), (None, 4))),
    ),
    Case("int8 (embedding and its transpose)", lambda: _quantized("int8", _tied)),
    Case(
        "float8",
        lambda: _quantized("float8", _classifier),
        refused="float8.*dense",
        reason="ONNX Runtime has no products of float8 on a CPU.",
    ),
]
