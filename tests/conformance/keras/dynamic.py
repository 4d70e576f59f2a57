"""Images and series of any size, through every kind of layer that has to do with sizes."""

from typing import Any

import keras
from keras import layers
from tests.conformance.keras.case import Case, Model

_PIXELS = (None, None, 3)


def _images(*stack: Any) -> Model:
    return keras.Sequential([keras.Input(_PIXELS, name="image"), *stack])


def _there_and_back() -> Model:
    """A residual block, a stride and its transpose."""
    image = keras.Input(_PIXELS, name="image")
    half = layers.Conv2D(4, 3, strides=2, padding="same")(image)
    block = layers.Add()([half, layers.Conv2D(4, 3, padding="same")(half)])
    quarter = layers.SeparableConv2D(6, 3, strides=2, padding="same")(block)
    return keras.Model(image, layers.Conv2DTranspose(4, 3, strides=2, padding="same")(quarter))


def _segmentation() -> Model:
    image = keras.Input(_PIXELS, name="image")
    low = layers.MaxPooling2D(2)(layers.Conv2D(4, 3, padding="same", activation="relu")(image))
    return keras.Model(image, layers.Conv2D(2, 1)(layers.UpSampling2D(2, interpolation="bilinear")(low)))


def _attentive() -> Model:
    steps = keras.Input((None, 8), name="steps")
    attended = layers.MultiHeadAttention(2, 4)(steps, steps)
    read = layers.Bidirectional(layers.LSTM(3, return_sequences=True))(attended)
    return keras.Model(steps, layers.GlobalMaxPooling1D()(layers.Attention()([read, read])))


def _masked_attention() -> Model:
    """A mask for each pair of steps: its axes and the steps are of one size."""
    steps, mask = keras.Input((None, 8), name="steps"), keras.Input((None, None), dtype="bool", name="mask")
    attention = layers.MultiHeadAttention(2, 4)
    return keras.Model([steps, mask], attention(steps, steps, attention_mask=mask, use_causal_mask=True))


def _convolved_series() -> Model:
    steps = keras.Input((None, 4), name="steps")
    convolved = layers.Conv1D(4, 3, padding="causal", dilation_rate=2)(steps)
    return keras.Model(steps, layers.UpSampling1D(2)(layers.AveragePooling1D(2)(convolved)))


CASES = [
    Case("series (MultiHeadAttention, a mask as an input)", _masked_attention),
    Case("images (Resizing)", lambda: _images(layers.Resizing(8, 8), layers.Conv2D(4, 3), layers.Flatten())),
    Case("images (CenterCrop)", lambda: _images(layers.CenterCrop(8, 8), layers.Flatten(), layers.Dense(2))),
    Case("images (GlobalMaxPooling2D)", lambda: _images(layers.Conv2D(4, 3), layers.GlobalMaxPooling2D())),
    Case("images (residual block, strides, Conv2DTranspose)", _there_and_back),
    Case("images (bilinear UpSampling2D)", _segmentation),
    Case("series (attention, Bidirectional, GlobalMaxPooling1D)", _attentive),
    Case("series (causal Conv1D, AveragePooling1D, UpSampling1D)", _convolved_series),
]
