"""Layers that read the size of an image in Python, where a graph of any size has none.

Keras cannot trace UpSampling2D: it asks whether an unknown size is positive. CenterCrop it traces as if no image were
smaller than the crop.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import keras
import tensorflow as tf

Layer = Any  # Keras publishes no types


@contextmanager
def sized_by_tensors(layers: Iterable[Layer]) -> Iterator[None]:
    """While it lasts, UpSampling2D layers that interpolate, and CenterCrop layers, take images of any size."""
    with ExitStack() as restored:
        for layer in layers:
            call = _replaced_call(layer)
            if call is not None and layer.data_format == "channels_last":
                layer.call = partial(call, layer)
                restored.callback(delattr, layer, "call")
        yield


def _replaced_call(layer: Layer) -> Any:  # noqa: ANN401 a function that takes what the layer takes
    if isinstance(layer, keras.layers.UpSampling2D) and layer.interpolation != "nearest":
        return _enlarged
    return _cropped if isinstance(layer, keras.layers.CenterCrop) else None


def _enlarged(layer: Layer, inputs: Any) -> Any:  # noqa: ANN401 symbolic TensorFlow tensors
    sizes = tf.shape(inputs)[1:3] * tf.constant(layer.size)
    resized = tf.image.resize(inputs, sizes, method=layer.interpolation)
    height, width = (size and size * factor for size, factor in zip(inputs.shape[1:3], layer.size, strict=True))
    resized.set_shape((None, height, width, inputs.shape[3]))
    return tf.cast(resized, inputs.dtype)


def _cropped(layer: Layer, inputs: Any, **options: Any) -> Any:  # noqa: ANN401 symbolic TensorFlow tensors
    """The crop; of a smaller image its largest part of the crop's proportions, resized.

    A crop is resized, too, to the size that it has, which leaves it as it is.
    """
    if inputs.shape.rank != 4 or None not in inputs.shape[1:3]:
        return type(layer).call(layer, inputs, **options)
    crop = tf.constant((layer.height, layer.width))
    sizes = tf.shape(inputs)[1:3]
    proportional = tf.maximum(tf.minimum(sizes, sizes[::-1] * crop // crop[::-1]), 1)
    taken = tf.where(tf.reduce_all(sizes >= crop), crop, proportional)
    start, end = (sizes - taken) // 2, (sizes - taken) // 2 + taken
    part = tf.cast(inputs, layer.compute_dtype)[:, start[0] : end[0], start[1] : end[1], :]
    return tf.cast(tf.image.resize(part, (layer.height, layer.width)), layer.compute_dtype)
