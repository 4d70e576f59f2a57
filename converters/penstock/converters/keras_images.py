"""UpSampling2D of images of any size, which Keras itself cannot trace: it asks whether an unknown size is positive."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import keras
import tensorflow as tf

Layer = Any  # Keras publishes no types


@contextmanager
def sized_by_tensors(layers: Iterable[Layer]) -> Iterator[None]:
    """While it lasts, UpSampling2D layers that interpolate take images of any size."""
    with ExitStack() as restored:
        for layer in layers:
            if (
                isinstance(layer, keras.layers.UpSampling2D)
                and layer.interpolation != "nearest"
                and layer.data_format == "channels_last"
            ):
                layer.call = partial(_call, layer)
                restored.callback(delattr, layer, "call")
        yield


def _call(layer: Layer, inputs: Any) -> Any:  # noqa: ANN401 symbolic TensorFlow tensors
    sizes = tf.shape(inputs)[1:3] * tf.constant(layer.size)
    resized = tf.image.resize(inputs, sizes, method=layer.interpolation)
    height, width = (size and size * factor for size, factor in zip(inputs.shape[1:3], layer.size, strict=True))
    resized.set_shape((None, height, width, inputs.shape[3]))
    return tf.cast(resized, inputs.dtype)
