"""Preprocessing inside the model: images, numbers, categories and text. Strings go in."""

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import layers
from tests.conformance.keras.case import Case, Model, around

_HASHES = "ONNX has no hash of a text; a lookup with a vocabulary converts."
_WORDS = ["red", "green", "blue", "don", "don't", "你", "好"]


def _normalization() -> Model:
    layer = layers.Normalization()
    layer.adapt(np.arange(24, dtype="float32").reshape(6, 4))
    return around(layer, (4,))


def _integers(**options: Any) -> Model:
    vocabulary = options.pop("vocabulary", [3, 1, 7])
    return around(layers.IntegerLookup(vocabulary=vocabulary, name="ids", **options), (4,), dtype="int64")


def _strings(width: int | None = 4, **options: Any) -> Model:
    return around(layers.StringLookup(vocabulary=_WORDS, name="words", **options), (width,), dtype="string")


def _text(**options: Any) -> Model:
    return around(layers.TextVectorization(vocabulary=_WORDS, name="text", **options), (1,), dtype="string")


def _categories(mode: str, width: int = 3, **options: Any) -> Model:
    return around(layers.CategoryEncoding(5, output_mode=mode, **options), (width,), dtype="int32")


def _weighted() -> Model:
    ids, weights = keras.Input((3,), dtype="int32", name="ids"), keras.Input((3,), name="weights")
    encoding = layers.CategoryEncoding(5, output_mode="count")
    return keras.Model([ids, weights], encoding(ids, count_weights=weights))


def _scores() -> Model:
    """The whole way: a sentence in, a score out."""
    sentence = keras.Input((), dtype="string", name="sentence")
    ids = layers.TextVectorization(vocabulary=_WORDS, output_sequence_length=5)(sentence)
    words = layers.Embedding(len(_WORDS) + 2, 4, mask_zero=True)(ids)
    return keras.Model(sentence, layers.Dense(1, name="score")(layers.GlobalAveragePooling1D()(words)))


def _image(layer: Callable[[Any], Any]) -> Model:
    return around(layer, (8, 10, 3))


# Random augmentation does nothing at inference.
_RANDOM: dict[str, Any] = {
    "AugMix": {},
    "CutMix": {},
    "MixUp": {},
    "RandAugment": {},
    "RandomBrightness": {"factor": 0.2},
    "RandomColorDegeneration": {"factor": 0.2},
    "RandomColorJitter": {},
    "RandomContrast": {"factor": 0.2},
    "RandomCrop": {"height": 6, "width": 6},
    "RandomElasticTransform": {},
    "RandomErasing": {},
    "RandomFlip": {},
    "RandomGaussianBlur": {},
    "RandomGrayscale": {},
    "RandomHue": {"factor": 0.2},
    "RandomInvert": {},
    "RandomPerspective": {},
    "RandomPosterization": {"factor": 4},
    "RandomRotation": {"factor": 0.2},
    "RandomSaturation": {"factor": 0.2},
    "RandomSharpness": {"factor": 0.2},
    "RandomShear": {},
    "RandomTranslation": {"height_factor": 0.1, "width_factor": 0.1},
    "RandomZoom": {"height_factor": 0.1},
}


def _random(name: str) -> Case:
    return Case(name, lambda: _image(getattr(layers, name)(**_RANDOM[name])))


CASES = [
    Case("Normalization", _normalization),
    Case("Normalization (inverted)", lambda: around(layers.Normalization(mean=2.0, variance=3.0, invert=True), (4,))),
    Case("Rescaling", lambda: _image(layers.Rescaling(1 / 127.5, offset=-1))),
    Case("Resizing", lambda: _image(layers.Resizing(6, 5))),
    Case("Resizing (nearest)", lambda: _image(layers.Resizing(6, 5, interpolation="nearest"))),
    Case("Resizing (any size)", lambda: around(layers.Resizing(6, 5), (None, None, 3)), tolerance=1e-4),
    Case("Resizing (cropped)", lambda: _image(layers.Resizing(6, 5, crop_to_aspect_ratio=True))),
    Case("Resizing (bicubic)", lambda: _image(layers.Resizing(16, 20, interpolation="bicubic"))),
    Case(
        "Resizing (bicubic, any size)",
        lambda: around(layers.Resizing(24, 31, interpolation="bicubic"), (None, None, 3)),
    ),
    Case(
        "Resizing (by area)",
        lambda: _image(layers.Resizing(6, 5, interpolation="area")),
        refused="ResizeArea in 'resizing'.*'bilinear', 'bicubic' or 'nearest'",
        reason="ONNX has no such interpolation.",
    ),
    Case(
        "Resizing (lanczos3)",
        lambda: _image(layers.Resizing(6, 5, interpolation="lanczos3")),
        refused="ScaleAndTranslate in 'resizing'.*'bilinear', 'bicubic' or 'nearest'",
        reason="ONNX has no such interpolation.",
    ),
    Case("CenterCrop", lambda: _image(layers.CenterCrop(6, 5))),
    Case("CenterCrop (larger)", lambda: _image(layers.CenterCrop(12, 5))),
    Case("AutoContrast", lambda: _image(layers.AutoContrast(value_range=(-3, 3)))),
    Case("Solarization", lambda: _image(layers.Solarization(value_range=(-3, 3)))),
    Case(
        "ContrastLimitedAdaptiveHistogramEqualization",
        lambda: _image(layers.ContrastLimitedAdaptiveHistogramEqualization(value_range=(-3, 3))),
    ),
    Case("Pipeline", lambda: _image(layers.Pipeline([layers.Rescaling(0.5), layers.CenterCrop(6, 5)]))),
    *map(_random, _RANDOM),
    Case("MelSpectrogram", lambda: around(layers.MelSpectrogram(fft_length=64, sequence_stride=32), (256,))),
    Case("STFTSpectrogram", lambda: around(layers.STFTSpectrogram(frame_length=32, fft_length=32), (256, 1))),
    Case("Discretization", lambda: around(layers.Discretization(bin_boundaries=[-1.0, 0.0, 0.5]), (4,))),
    Case(
        "Discretization (one_hot)",
        lambda: around(layers.Discretization(bin_boundaries=[-1.0, 0.0], output_mode="one_hot"), (1,)),
    ),
    Case("CategoryEncoding (one_hot)", lambda: _categories("one_hot", width=1)),
    Case("CategoryEncoding", lambda: _categories("multi_hot")),
    Case("CategoryEncoding (count)", lambda: _categories("count")),
    Case("CategoryEncoding (weighted)", _weighted),
    Case("IntegerLookup", _integers),
    Case("IntegerLookup (masked)", lambda: _integers(mask_token=0)),
    Case("IntegerLookup (no unknown)", lambda: _integers(num_oov_indices=0)),
    Case("IntegerLookup (several unknown)", lambda: _integers(num_oov_indices=3)),
    Case("IntegerLookup (multi_hot)", lambda: _integers(output_mode="multi_hot")),
    Case("IntegerLookup (inverted)", lambda: _integers(vocabulary=[3, 1, 7], invert=True)),
    Case("StringLookup", _strings),
    Case("StringLookup (masked)", lambda: _strings(mask_token="")),
    Case("StringLookup (no unknown)", lambda: _strings(num_oov_indices=0)),
    Case(
        "StringLookup (several unknown)",
        lambda: _strings(num_oov_indices=3),
        refused="StringToHashBucketFast",
        reason=_HASHES,
    ),
    Case("StringLookup (one_hot)", lambda: _strings(1, output_mode="one_hot")),
    Case("StringLookup (multi_hot)", lambda: _strings(output_mode="multi_hot")),
    Case("StringLookup (count)", lambda: _strings(output_mode="count")),
    Case(
        "StringLookup (tf_idf)",
        lambda: _strings(output_mode="tf_idf", idf_weights=np.linspace(0.1, 0.9, len(_WORDS)).tolist()),
    ),
    Case(
        "StringLookup (inverted)",
        lambda: around(layers.StringLookup(vocabulary=_WORDS, invert=True), (4,), dtype="int64"),
    ),
    Case("TextVectorization", _text),
    Case("TextVectorization (padded)", lambda: _text(output_sequence_length=4)),
    Case("TextVectorization (lower)", lambda: _text(standardize="lower")),
    Case("TextVectorization (strip_punctuation)", lambda: _text(standardize="strip_punctuation")),
    Case("TextVectorization (as it is)", lambda: _text(standardize=None)),
    Case("TextVectorization (character)", lambda: _text(split="character")),
    Case("TextVectorization (whole)", lambda: _text(split=None)),
    Case("TextVectorization (multi_hot)", lambda: _text(output_mode="multi_hot")),
    Case("TextVectorization (count)", lambda: _text(output_mode="count")),
    Case(
        "TextVectorization (tf_idf)",
        lambda: _text(output_mode="tf_idf", idf_weights=np.linspace(0.1, 0.9, len(_WORDS)).tolist()),
    ),
    Case(
        "TextVectorization (n-grams)",
        lambda: _text(ngrams=2),
        refused="'text'.*ngrams",
        reason="ONNX cannot join neighbours.",
    ),
    Case("TextVectorization to a score", _scores),
    Case(
        "Hashing",
        lambda: around(layers.Hashing(5, name="buckets"), (3,), dtype="string"),
        refused="'buckets'",
        reason=_HASHES,
    ),
    Case(
        "HashedCrossing",
        lambda: around(layers.HashedCrossing(5, name="crossing"), (1,), (1,), dtype="string"),
        refused="'crossing'",
        reason=_HASHES,
    ),
]
