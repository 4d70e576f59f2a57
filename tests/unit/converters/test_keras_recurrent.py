"""Recurrent layers become one operator each, with the answers of Keras on every kind of mask.

`convert` compares the answers; the rows of IDS are those that masks go wrong on.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from penstock.converters import convert
from penstock.converters.conversion import _quiet_tensorflow

_quiet_tensorflow()
keras = pytest.importorskip("keras")
layers = keras.layers

# TensorFlow's AutoGraph builds syntax trees in a way that Python 3.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:.*got an unexpected keyword argument .___pyct_anno:DeprecationWarning")

IDS = np.array([[1, 2, 3, 0, 0, 0], [0, 0, 1, 2, 0, 3], [0, 0, 0, 0, 0, 0], [1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 0, 4]])
"""Padded at the end, everywhere, nothing but padding, none, all but the last."""

OPERATORS = {"LSTM": layers.LSTM, "GRU": layers.GRU, "RNN": layers.SimpleRNN}


@pytest.fixture(autouse=True)
def _fresh_names() -> None:
    keras.utils.clear_session()
    keras.utils.set_random_seed(7)


def _operators(model: Any, path: Path, samples: dict[str, Any] | None = None) -> Counter[str]:
    convert(model, path, samples=samples)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def _layer(operator: str, *, bias: bool = True, **options: Any) -> Any:
    return OPERATORS[operator](4, use_bias=bias, bias_initializer="uniform", **options)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_way_of_running_on_a_mask(operator: str, tmp_path: Path) -> None:
    ids = keras.Input((None,), dtype="int32", name="ids")
    rows = layers.Embedding(7, 5, mask_zero=True)(ids)
    both = layers.Bidirectional(_layer(operator, return_sequences=True))(rows)
    outputs = {
        "last": _layer(operator)(rows),
        "last_backwards": _layer(operator, go_backwards=True)(rows),
        "sequence": _layer(operator, return_sequences=True)(rows),
        "sequence_backwards": _layer(operator, return_sequences=True, go_backwards=True)(rows),
        "both": both,
        "stacked": layers.Bidirectional(_layer(operator))(both),
    }
    operators = _operators(keras.Model(ids, outputs), tmp_path / "model.onnx", {"ids": IDS})
    assert operators[operator] == 8
    assert not {"Loop", "Scan"} & set(operators)


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_way_of_running_without_one(operator: str, tmp_path: Path) -> None:
    rows = keras.Input((None, 5), name="rows")
    cell = {"LSTM": layers.LSTMCell, "GRU": layers.GRUCell, "RNN": layers.SimpleRNNCell}[operator](3)
    outputs = {
        "last": _layer(operator, bias=False)(rows),
        "sequence_backwards": _layer(operator, return_sequences=True, go_backwards=True)(rows),
        "both": layers.Bidirectional(_layer(operator, return_sequences=True))(rows),
        "relu": _layer(operator, activation="relu")(rows),
        "linear": _layer(operator, activation="linear")(rows),
        "cell": layers.RNN(cell)(rows),
        "dropout": _layer(operator, dropout=0.5, recurrent_dropout=0.5)(rows),
    }
    operators = _operators(keras.Model(rows, outputs), tmp_path / "model.onnx")
    assert operators[operator] == 8
    assert not {"Loop", "Scan"} & set(operators)


def test_options_of_the_gates(tmp_path: Path) -> None:
    rows = keras.Input((6, 5), name="rows")
    outputs = {
        "before": _layer("GRU", reset_after=False)(rows),
        "before_without_bias": _layer("GRU", reset_after=False, bias=False)(rows),
        "after": _layer("GRU", reset_after=True, recurrent_activation="hard_sigmoid")(rows),
        "linear_gates": _layer("LSTM", recurrent_activation="hard_sigmoid", activation="linear")(rows),
        "unrolled": _layer("LSTM", unroll=True, return_sequences=True)(rows),
    }
    operators = _operators(keras.Model(rows, outputs), tmp_path / "model.onnx")
    assert (operators["GRU"], operators["LSTM"]) == (3, 2)


@pytest.mark.parametrize("operator", OPERATORS)
def test_states_that_go_in_and_out(operator: str, tmp_path: Path) -> None:
    """A row of padding alone keeps the state it was given, and answers zeros."""
    ids = keras.Input((None,), dtype="int32", name="ids")
    rows = layers.Embedding(7, 5, mask_zero=True)(ids)
    start = [keras.Input((4,), name=f"start_{index}") for index in range(2 if operator == "LSTM" else 1)]
    answer, *states = _layer(operator, return_state=True)(rows, initial_state=start)
    _, *again = _layer(operator, return_sequences=True, return_state=True)(rows, initial_state=states)
    samples = {"ids": IDS, **{tensor.name: np.full((len(IDS), 4), 0.3, np.float32) for tensor in start}}
    model = keras.Model([ids, *start], [answer, *states, *again])
    assert _operators(model, tmp_path / "model.onnx", samples)[operator] == 2


@pytest.mark.parametrize(
    "layer",
    [
        {"activation": "selu"},  # ONNX's LSTM has no such activation
        {"zero_output_for_mask": True},  # its last output is zero where the last step is masked
    ],
)
def test_other_layers_stay_loops_and_right(layer: dict[str, Any], tmp_path: Path) -> None:
    ids = keras.Input((None,), dtype="int32", name="ids")
    rows = layers.Embedding(7, 5, mask_zero=True)(ids)
    operators = _operators(keras.Model(ids, layers.LSTM(4, **layer)(rows)), tmp_path / "model.onnx", {"ids": IDS})
    assert not operators["LSTM"]


def test_layers_run_as_ever_once_a_model_is_converted(tmp_path: Path) -> None:
    before = layers.LSTM.inner_loop, layers.GRU.inner_loop, layers.RNN.inner_loop
    _operators(keras.Sequential([keras.Input((3, 2)), layers.LSTM(2)]), tmp_path / "model.onnx")
    assert (layers.LSTM.inner_loop, layers.GRU.inner_loop, layers.RNN.inner_loop) == before


def test_the_same_bytes_twice(tmp_path: Path) -> None:
    ids = keras.Input((None,), dtype="int32", name="ids")
    rows = layers.Embedding(7, 5, mask_zero=True)(ids)
    model = keras.Model(ids, layers.Bidirectional(layers.GRU(4, return_sequences=True))(rows))
    first, second = (convert(model, tmp_path / name) for name in ("first.onnx", "second.onnx"))
    assert first.sha256 == second.sha256
