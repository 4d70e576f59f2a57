"""Every activation by its name."""

import keras
from keras import layers
from tests.conformance.keras.case import Case, around

NAMES = [
    "celu",
    "elu",
    "exponential",
    "gelu",
    "glu",
    "hard_shrink",
    "hard_sigmoid",
    "hard_silu",
    "hard_tanh",
    "leaky_relu",
    "linear",
    "log_sigmoid",
    "log_softmax",
    "mish",
    "relu",
    "relu6",
    "selu",
    "sigmoid",
    "silu",
    "soft_shrink",
    "softmax",
    "softplus",
    "softsign",
    "sparse_plus",
    "sparse_sigmoid",
    "sparsemax",
    "squareplus",
    "tanh",
    "tanh_shrink",
    "threshold",
]


def _activation(name: str) -> Case:
    return Case(name, lambda: around(layers.Dense(6, activation=name, name="curve"), (4,)))


CASES = [
    *(_activation(name) for name in NAMES if name != "threshold"),
    Case("threshold", lambda: around(lambda x: keras.activations.threshold(x, 0.1, 0.0), (4,))),
]
