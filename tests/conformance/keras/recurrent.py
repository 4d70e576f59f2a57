"""Recurrent layers, plain, masked and both ways."""

from collections.abc import Callable
from typing import Any

import keras
from keras import layers
from tests.conformance.keras.case import Case, Model, around

_SERIES = (None, 4)


def _masked(layer: Callable[[Any], Any]) -> Model:
    tokens = keras.Input((6,), dtype="int32", name="tokens")
    return keras.Model(tokens, layer(layers.Embedding(5, 4, mask_zero=True)(tokens)))


CASES = [
    Case("LSTM", lambda: around(layers.LSTM(3), _SERIES)),
    Case("LSTM (sequences)", lambda: around(layers.LSTM(3, return_sequences=True), _SERIES)),
    Case("LSTM (state)", lambda: around(layers.LSTM(3, return_state=True), _SERIES)),
    Case("LSTM (backwards)", lambda: around(layers.LSTM(3, go_backwards=True), _SERIES)),
    Case("LSTM (masked)", lambda: _masked(layers.LSTM(3))),
    Case("GRU", lambda: around(layers.GRU(3), _SERIES)),
    Case("GRU (reset_after=False)", lambda: around(layers.GRU(3, reset_after=False), _SERIES)),
    Case("GRU (masked)", lambda: _masked(layers.GRU(3, return_sequences=True))),
    Case("SimpleRNN", lambda: around(layers.SimpleRNN(3), _SERIES)),
    Case("SimpleRNN (masked)", lambda: _masked(layers.SimpleRNN(3))),
    Case("Bidirectional", lambda: around(layers.Bidirectional(layers.LSTM(3)), _SERIES)),
    Case("Bidirectional (masked)", lambda: _masked(layers.Bidirectional(layers.GRU(3)))),
    Case("RNN", lambda: around(layers.RNN(layers.LSTMCell(3)), _SERIES)),
    Case("GRUCell", lambda: around(layers.RNN(layers.GRUCell(3)), _SERIES)),
    Case("LSTMCell", lambda: around(layers.RNN(layers.LSTMCell(3), unroll=True), (4, 3))),
    Case("SimpleRNNCell", lambda: around(layers.RNN(layers.SimpleRNNCell(3)), _SERIES)),
    Case(
        "StackedRNNCells",
        lambda: around(layers.RNN(layers.StackedRNNCells([layers.LSTMCell(3), layers.GRUCell(2)])), _SERIES),
    ),
    Case("ConvLSTM1D", lambda: around(layers.ConvLSTM1D(2, 3), (3, 6, 2))),
    Case("ConvLSTM2D", lambda: around(layers.ConvLSTM2D(2, 3, padding="same"), (3, 6, 5, 2))),
    Case("ConvLSTM3D", lambda: around(layers.ConvLSTM3D(2, 2), (2, 4, 5, 6, 2))),
]
