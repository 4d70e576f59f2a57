"""TextVectorization as dense tensors: what ONNX can say of it, and the layers it cannot say, by name.

Keras splits text into ragged tensors. Padded with the empty string, which is the layer's mask token and which no
split gives, the tokens are the same and dense; `tf_strings` says the rest in ONNX.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import keras
import tensorflow as tf

from penstock.converters.errors import UnsupportedModelError

# The pattern of Keras's own strip_punctuation.
PUNCTUATION = r'[!"#$%&()\*\+,-\./:;<=>?@\[\\\]^_`{|}~\']'

Layer = Any  # Keras publishes no types


@contextmanager
def dense_text(layers: Iterable[Layer]) -> Iterator[None]:
    """While it lasts, calls of TextVectorization layers give dense tensors. Raises `UnsupportedModelError`."""
    with ExitStack() as restored:
        for layer in layers:
            if isinstance(layer, keras.layers.TextVectorization):
                _check(layer)
                layer.call = partial(_call, layer)
                restored.callback(delattr, layer, "call")
        yield


def _check(layer: Layer) -> None:
    config = layer.get_config()
    if callable(layer._standardize) or callable(layer._split):  # noqa: SLF001 the configuration may hold a function's name
        option = "standardize" if callable(layer._standardize) else "split"  # noqa: SLF001
        raise UnsupportedModelError(
            f"The layer {layer.name!r} has a function of its own as {option}, which ONNX cannot say. Use one of the "
            "layer's names for it, or do this before the model is called."
        )
    for option in ("ngrams", "ragged", "sparse"):
        if config.get(option):
            raise UnsupportedModelError(
                f"The layer {layer.name!r} has {option}={config[option]}, which ONNX cannot say. Set it to None or "
                "False, or make the tokens before the model is called."
            )


def _call(layer: Layer, inputs: Any) -> Any:  # noqa: ANN401 symbolic TensorFlow tensors
    standardize, split = layer._standardize, layer._split  # noqa: SLF001
    text = tf.reshape(inputs, [-1]) if split else inputs
    if standardize in {"lower", "lower_and_strip_punctuation"}:
        text = tf.strings.lower(text)
    if standardize in {"strip_punctuation", "lower_and_strip_punctuation"}:
        text = tf.strings.regex_replace(text, PUNCTUATION, "")
    if split == "whitespace":
        text = tf.strings.split(text).to_tensor("")
    elif split == "character":
        text = tf.strings.unicode_split(text, "UTF-8").to_tensor("")
    found = layer._lookup_layer.call(text)  # noqa: SLF001
    length = layer.get_config()["output_sequence_length"]
    if layer.get_config()["output_mode"] != "int" or length is None:
        return found
    padding = [[0, 0]] * (found.shape.rank - 1) + [[0, length]]
    return tf.pad(found, padding)[..., :length]
