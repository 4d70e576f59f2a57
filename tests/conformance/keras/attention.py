"""Attention layers."""

from typing import Any

import keras
from keras import layers
from tests.conformance.keras.case import Case, Model, around


def _padded() -> Model:
    """A transformer's block: a mask from an embedding reaches the attention."""
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    vectors: Any = layers.Embedding(5, 8, mask_zero=True)(tokens)
    attended = layers.MultiHeadAttention(2, 4)(vectors, vectors)
    return keras.Model(tokens, layers.LayerNormalization()(layers.Add()([vectors, attended])))


def _causal() -> Model:
    steps = keras.Input((None, 8), name="steps")
    return keras.Model(steps, layers.MultiHeadAttention(2, 4)(steps, steps, use_causal_mask=True))


def _grouped() -> Model:
    steps = keras.Input((None, 8), name="steps")
    return keras.Model(steps, layers.GroupQueryAttention(4, 4, 2)(steps, steps))


def _cross() -> Model:
    query, value = keras.Input((None, 8), name="query"), keras.Input((5, 6), name="value")
    return keras.Model([query, value], layers.MultiHeadAttention(2, 4)(query, value))


CASES = [
    Case("Attention", lambda: around(layers.Attention(use_scale=True), (None, 4), (5, 4))),
    Case("AdditiveAttention", lambda: around(layers.AdditiveAttention(), (3, 4), (5, 4))),
    Case("MultiHeadAttention", _padded),
    Case("MultiHeadAttention (causal)", _causal),
    Case("MultiHeadAttention (cross)", _cross),
    Case("GroupQueryAttention", _grouped),
]
