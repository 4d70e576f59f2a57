"""What a row of the table of coverage is, and how small models are written down shortly."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import keras
from numpy.typing import NDArray

Model = Any  # Keras publishes no types
Samples = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Case:
    """A small model around one layer, activation or operation, and a part of the error if it is refused.

    `reason` is for the document. `tolerance` is the absolute one, larger where
    ONNX Runtime counts positions in an image a little differently.
    """

    name: str
    build: Callable[[], Model]
    refused: str = ""
    reason: str = ""
    tolerance: float | None = None
    samples: Samples | None = None


def around(layer: Callable[[Any], Any], *shapes: tuple[int | None, ...], dtype: str = "float32") -> Model:
    """A model of one call: several shapes are several inputs, given as a list."""
    inputs = [keras.Input(shape, dtype=dtype, name=f"x{index}") for index, shape in enumerate(shapes)]
    return keras.Model(inputs, layer(inputs[0] if len(inputs) == 1 else inputs))
