"""Models with a `call` of their own, called once or told by samples."""

from typing import Any

import keras
import numpy as np
from keras import layers, ops
from tests.conformance.keras.case import Case, Model

TOKENS = np.array([[1, 2, 3, 0], [4, 0, 0, 0]], np.int32)
NUMBERS = np.linspace(-1, 1, 10, dtype=np.float32).reshape(2, 5)


class Classifier(keras.Model):  # type: ignore[misc]  # Keras publishes no types
    def __init__(self) -> None:
        super().__init__()
        self.hidden = layers.Dense(4, activation="relu")
        self.dropout = layers.Dropout(0.5)
        self.scores = layers.Dense(3)

    def call(self, features: Any, training: bool | None = None) -> Any:
        return self.scores(self.dropout(self.hidden(features), training=training))


class Tagger(keras.Model):  # type: ignore[misc]
    """A dict with a nested list in, a dict with nested ones out, neither in the order of the alphabet."""

    def __init__(self) -> None:
        super().__init__()
        self.words = layers.Embedding(5, 4, mask_zero=True)
        self.reader = layers.GRU(3)
        self.mixed = layers.Dense(2)

    def call(self, inputs: Any) -> Any:
        read = self.reader(self.words(inputs["words"]))
        low, high = inputs["bounds"]
        return {"tag": self.mixed(read), "parts": {"low": ops.minimum(low, high), "high": high - low}, "read": read}


class Comparison(keras.Model):  # type: ignore[misc]
    """Two arguments, and a tuple as an answer."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = layers.Dense(3)

    def call(self, query: Any, value: Any, scale: Any = None) -> Any:
        difference = self.shared(query) - self.shared(value)
        return difference if scale is None else difference * scale, ops.abs(difference)


class Pair(keras.Model):  # type: ignore[misc]
    def call(self, inputs: Any) -> Any:
        first, second = inputs
        return [first + second, first]


class Stepwise(keras.Model):  # type: ignore[misc]
    """Built before it is called, for any number of steps."""

    def build(self, input_shape: Any) -> None:
        self.scale = self.add_weight(shape=(input_shape[-1],), initializer="glorot_uniform")

    def call(self, steps: Any) -> Any:
        return ops.cumsum(steps * self.scale, axis=1)


class Branching(keras.Model):  # type: ignore[misc]
    def call(self, x: Any) -> Any:
        return x if float(ops.sum(x)) > 0 else -x


class Halved(layers.Layer):  # type: ignore[misc]
    """Keras builds a Functional model with it, because it says itself what comes out."""

    def call(self, x: Any) -> Any:
        return x / 2 if float(ops.max(x)) > 1 else x

    def compute_output_spec(self, x: Any) -> Any:
        return keras.KerasTensor(x.shape, x.dtype)


def called(model: Model, *batch: Any, **more: Any) -> Model:
    model(*batch, **more)
    return model


def called_tagger() -> Model:
    return called(Tagger(), {"words": TOKENS, "bounds": [NUMBERS, NUMBERS]})


def called_sequential() -> Model:
    return called(keras.Sequential([layers.Dense(4), layers.Dense(2)]), NUMBERS)


def built_sequential() -> Model:
    model = keras.Sequential([layers.Dense(4), layers.Dense(2, name="last")])
    model.build((None, 5))
    return model


def built() -> Model:
    model = Stepwise()
    model.build((None, None, 5))
    return model


def inside_a_functional() -> Model:
    features = keras.Input((5,), name="features")
    return keras.Model(features, layers.Dense(2, name="last")(Classifier()(features)))


CASES = [
    Case("keras.Model (called on an array)", lambda: called(Classifier(), NUMBERS)),
    Case("keras.Model (called on a list)", lambda: called(Pair(), [NUMBERS, NUMBERS])),
    Case("keras.Model (built with steps of any number)", built),
    Case("keras.Model (inside a Functional model)", inside_a_functional),
    Case(
        "keras.Model (called on nested dicts, with samples)",
        called_tagger,
        samples={"words": TOKENS, "bounds_0": NUMBERS, "bounds_1": NUMBERS * 2},
    ),
    Case("keras.Model (arguments, by samples)", Comparison, samples={"value": NUMBERS, "query": NUMBERS * 2}),
    Case("keras.Sequential (built)", built_sequential),
    Case(
        "keras.Sequential (called)",
        called_sequential,
        refused=r"fixed shape \[2, 5\].*`build` with None",
        reason="It has the size of the batch it was called on: build it with None first.",
    ),
    Case(
        "keras.Model (neither called nor told)",
        Classifier,
        refused="does not say what its inputs are.*features",
        reason="Call it once, or give samples.",
    ),
    Case(
        "keras.Model (several arguments, no samples)",
        lambda: called(Comparison(), NUMBERS, NUMBERS),
        refused="does not say what its inputs are.*query, value, scale",
        reason="Keras keeps the shape of the first alone: give samples.",
    ),
    Case(
        "keras.Model (integers, no samples)",
        called_tagger,
        refused="no datatypes of a call.*embedding",
        reason="Keras keeps no datatypes: give samples.",
    ),
    Case(
        "keras.Model (a condition in Python)",
        lambda: called(Branching(), NUMBERS),
        refused="cannot be traced",
        reason="Its call cannot be traced.",
    ),
    Case(
        "keras.Layer (a condition in Python)",
        lambda: keras.Sequential([keras.Input((5,)), Halved()]),
        refused="cannot be traced",
        reason="Its call cannot be traced.",
    ),
]
