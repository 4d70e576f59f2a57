"""Pooling layers, and those that look at an image's neighbourhoods alike."""

from keras import layers
from tests.conformance.keras.case import Case, around

_SHAPES: list[tuple[int | None, ...]] = [(9, 3), (9, 8, 3), (6, 7, 8, 2)]


def _pool(name: str, dimensions: int, **options: object) -> Case:
    kind = f"{name}{dimensions}D"
    return Case(kind, lambda: around(getattr(layers, kind)(**options), _SHAPES[dimensions - 1]))


CASES = [
    *(_pool(name, n, pool_size=2, padding="same") for n in (1, 2, 3) for name in ("MaxPooling", "AveragePooling")),
    *(_pool(f"Global{name}Pooling", n) for n in (1, 2, 3) for name in ("Max", "Average")),
    *(_pool(f"Adaptive{name}Pooling", n, output_size=3) for n in (1, 2, 3) for name in ("Max", "Average")),
    Case("MaxPooling2D (any size)", lambda: around(layers.MaxPooling2D(3, strides=2), (None, None, 3))),
    Case("AveragePooling2D (any size)", lambda: around(layers.AveragePooling2D(2, padding="same"), (None, None, 3))),
]
