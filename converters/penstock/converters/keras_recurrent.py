"""LSTM, GRU and SimpleRNN layers as one ONNX operator each, where tf2onnx would write a loop.

While a model is traced, such a layer leaves a marker in the TensorFlow graph instead of its loop: an operation that is
never run, whose token says what stands there. tf2onnx hands the marker to `_Recurrent`, which writes the ONNX nodes.

A masked step leaves the state as it was, so a layer does the same on the unmasked steps alone: they are moved to the
front of their row, the operator runs as many steps as the row has, and each step's output is taken from the last
unmasked one before it. That is exact for any mask, not only for padding at the end.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras import activations, layers
from onnx import TensorProto
from tf2onnx.handler import tf_op

_OPERATORS: dict[Any, tuple[str, tuple[int, ...]]] = {
    layers.LSTMCell: ("LSTM", (0, 3, 1, 2)),
    layers.GRUCell: ("GRU", (0, 1, 2)),
    layers.SimpleRNNCell: ("RNN", (0,)),
}
"""The operator of each cell, and the order in which it wants the cell's gates."""

_ACTIVATIONS: dict[Any, tuple[str, tuple[float, ...], tuple[float, ...]]] = {
    activations.hard_sigmoid: ("HardSigmoid", (1 / 6,), (0.5,)),
    activations.linear: ("Affine", (1.0,), (0.0,)),
    activations.relu: ("Relu", (), ()),
    activations.sigmoid: ("Sigmoid", (), ()),
    activations.tanh: ("Tanh", (), ()),
}
"""What ONNX calls an activation, its alphas and its betas."""

_MARKER = "penstock-recurrent:"


@contextmanager
def marked() -> Iterator[None]:
    """Within it, layers of the known cells leave markers; others run as ever."""
    classes = (layers.RNN, layers.LSTM, layers.GRU)
    originals = [owner.inner_loop for owner in classes]
    try:
        for owner, original in zip(classes, originals, strict=True):
            owner.inner_loop = _marking(original)
        yield
    finally:
        for owner, original in zip(classes, originals, strict=True):
            owner.inner_loop = original


def _marking(original: Any) -> Any:  # noqa: ANN401 a method of Keras
    def inner_loop(layer: Any, sequences: Any, initial_state: Any, mask: Any, training: bool = False) -> Any:  # noqa: ANN401 Keras's signature
        mask = mask[0] if isinstance(mask, list | tuple) else mask
        if training or not _is_known(layer, sequences, mask):
            return original(layer, sequences, initial_state, mask, training=training)
        return _marker(layer, sequences, initial_state, mask)

    return inner_loop


def _is_known(layer: Any, sequences: Any, mask: Any) -> bool:  # noqa: ANN401 Keras publishes no types
    cell = layer.cell
    return (
        type(cell) in _OPERATORS
        and not layer.stateful
        # ONNX Runtime has the operators in float32 alone.
        and cell.compute_dtype == cell.variable_dtype == "float32"
        and len(sequences.shape) == 3
        and all(function in _ACTIVATIONS for function in _functions(cell))
        and (mask is None or (len(mask.shape) == 2 and not layer.unroll))
        # Such a layer answers zeros where the last step is masked; only Bidirectional sets it, and with sequences.
        and (mask is None or layer.return_sequences or not layer.zero_output_for_mask)
    )


def _functions(cell: Any) -> list[Any]:  # noqa: ANN401 Keras publishes no types
    """The activations in the order of the operator's attribute."""
    if isinstance(cell, layers.LSTMCell):
        return [cell.recurrent_activation, cell.activation, cell.activation]
    if isinstance(cell, layers.GRUCell):
        return [cell.recurrent_activation, cell.activation]
    return [cell.activation]


def _marker(layer: Any, sequences: Any, initial_state: Any, mask: Any) -> tuple[Any, Any, list[Any]]:  # noqa: ANN401 Keras publishes no types
    cell = layer.cell
    states = initial_state if isinstance(initial_state, list | tuple) else [initial_state]
    weights = [cell.kernel, cell.recurrent_kernel, *([cell.bias] if cell.use_bias else [])]
    operator, _ = _OPERATORS[type(cell)]
    said = {
        "operator": operator,
        "units": cell.units,
        "functions": [_ACTIVATIONS[function] for function in _functions(cell)],
        "reset_after": bool(getattr(cell, "reset_after", False)),
        "states": len(states),
        "is_masked": mask is not None,
        "is_backwards": layer.go_backwards,
        "zeroes_masked": layer.zero_output_for_mask,
    }
    answers = tf.raw_ops.PyFuncStateless(
        input=[
            sequences,
            *states,
            *(keras.ops.convert_to_tensor(weight) for weight in weights),
            *([] if mask is None else [tf.cast(mask, tf.bool)]),
        ],
        token=_MARKER + json.dumps(said),
        Tout=[tf.float32] * (2 + len(states)),
    )
    batch, steps = sequences.shape[:2]
    outputs = tf.ensure_shape(answers[0], [batch, steps, cell.units])
    last, *finals = (tf.ensure_shape(answer, [batch, cell.units]) for answer in answers[1:])
    return last, outputs if layer.return_sequences else last[:, None], finals


@tf_op("PyFuncStateless")
class _Recurrent:
    """The marker's ONNX nodes. Other operations of the kind stay: tf2onnx reports what it does not know."""

    @classmethod
    def version_14(cls, ctx: Any, node: Any, **_: Any) -> None:  # noqa: ANN401 tf2onnx publishes no types
        token = node.get_attr_str("token")
        if not token.startswith(_MARKER):
            return
        said = json.loads(token.removeprefix(_MARKER))
        rows, *others = node.input
        mask = others.pop() if said["is_masked"] else None
        states = others[: said["states"]]
        weights = [ctx.get_tensor_value(name, as_list=False) for name in others[said["states"] :]]
        answers = list(node.output)
        ctx.remove_node(node.name)
        nodes = _Nodes(ctx, node.name)
        if mask is None:
            values = _unmasked(nodes, rows, states, weights, said)
        else:
            values = _masked(nodes, rows, states, weights, mask, said)
        for answer, value in zip(answers, values, strict=True):
            ctx.make_node("Identity", [value], outputs=[answer], name=nodes.named("answer"))


class _Nodes:
    """Adds nodes to a tf2onnx graph."""

    def __init__(self, ctx: Any, name: str) -> None:  # noqa: ANN401 tf2onnx publishes no types
        self._ctx, self._name, self._number = ctx, name, 0

    def named(self, what: str) -> str:
        self._number += 1
        return f"{self._name}/{what}_{self._number}"

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:  # noqa: ANN401 attributes are of many types
        return self.add_many(operator, *inputs, outputs=1, **attributes)[0]

    def add_many(self, operator: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:  # noqa: ANN401 attributes are of many types
        name = self.named(operator)
        node = self._ctx.make_node(operator, list(inputs), attr=attributes, output_count=outputs, name=name)
        return list(node.output)

    def constant(self, value: Any, dtype: Any = np.int64) -> str:  # noqa: ANN401 whatever NumPy makes an array of
        return str(self._ctx.make_const(self.named("constant"), np.asarray(value, dtype)).output[0])


def _unmasked(
    nodes: _Nodes, rows: str, states: Sequence[str], weights: Sequence[Any], said: dict[str, Any]
) -> list[str]:
    direction = "reverse" if said["is_backwards"] else "forward"
    outputs, finals = _run(nodes, rows, states, weights, said, lengths="", direction=direction)
    if said["is_backwards"]:
        # ONNX keeps the order of time, Keras that of the steps.
        first, last, axis, stride = (nodes.constant([value]) for value in (-1, np.iinfo(np.int64).min, 1, -1))
        outputs = nodes.add("Slice", outputs, first, last, axis, stride)
    return [outputs, finals[0], *finals]


def _masked(
    nodes: _Nodes, rows: str, states: Sequence[str], weights: Sequence[Any], mask: str, said: dict[str, Any]
) -> list[str]:
    axis, per_row, inner = nodes.constant(1), nodes.constant([1]), nodes.constant([2])
    counted = nodes.add("Cast", mask, to=TensorProto.INT64)
    passed = nodes.add("CumSum", counted, axis)
    ahead = nodes.add("CumSum", counted, axis, reverse=1)
    steps = nodes.add("Shape", mask, start=1, end=2)
    if said["is_backwards"]:
        first, last, stride = (nodes.constant([value]) for value in (-1, np.iinfo(np.int64).min, -1))
        mask, seen = (nodes.add("Slice", tensor, first, last, per_row, stride) for tensor in (mask, ahead))
        rank = passed
    else:
        seen, rank = passed, ahead
    # The unmasked steps in the order in which they are run, and some masked ones behind them.
    _, order = nodes.add_many("TopK", nodes.add("Mul", counted, rank), steps, outputs=2, axis=1)
    front = nodes.add("GatherND", rows, nodes.add("Unsqueeze", order, inner), batch_dims=1)
    length = nodes.add("ReduceSum", counted, per_row, keepdims=0)
    lengths = nodes.add("Cast", length, to=TensorProto.INT32)
    outputs, finals = _run(nodes, front, states, weights, said, lengths=lengths, direction="forward")

    zero, none = nodes.constant(0.0, np.float32), nodes.constant(0)
    latest = nodes.add("Max", nodes.add("Sub", seen, axis), none)
    outputs = nodes.add("GatherND", outputs, nodes.add("Unsqueeze", latest, inner), batch_dims=1)
    speaks = mask if said["zeroes_masked"] else nodes.add("Greater", seen, none)
    outputs = nodes.add("Where", nodes.add("Unsqueeze", speaks, inner), outputs, zero)
    ran = nodes.add("Unsqueeze", nodes.add("Greater", length, none), per_row)
    last = nodes.add("Where", ran, finals[0], zero)
    return [outputs, last, *(nodes.add("Where", ran, *pair) for pair in zip(finals, states, strict=True))]


def _run(
    nodes: _Nodes,
    rows: str,
    states: Sequence[str],
    weights: Sequence[Any],
    said: dict[str, Any],
    *,
    lengths: str,
    direction: str,
) -> tuple[str, list[str]]:
    """The outputs as [batch, steps, units], and the last states."""
    operator = said["operator"]
    kernel, recurrent, bias = _packed(operator, said["reset_after"], *weights)
    first = nodes.constant([0])
    names, alphas, betas = zip(*said["functions"], strict=True)
    attributes: dict[str, Any] = {"hidden_size": said["units"], "direction": direction, "activations": list(names)}
    for name, values in (("activation_alpha", alphas), ("activation_beta", betas)):
        used = list(chain.from_iterable(values))
        attributes |= {name: used} if used else {}
    if operator == "GRU":
        attributes["linear_before_reset"] = int(said["reset_after"])
    outputs, *finals = nodes.add_many(
        operator,
        nodes.add("Transpose", rows, perm=[1, 0, 2]),
        *(nodes.constant(array, np.float32) for array in (kernel, recurrent, bias)),
        lengths,
        *(nodes.add("Unsqueeze", state, first) for state in states),
        outputs=1 + len(states),
        **attributes,
    )
    outputs = nodes.add("Squeeze", outputs, nodes.constant([1]))
    return nodes.add("Transpose", outputs, perm=[1, 0, 2]), [nodes.add("Squeeze", final, first) for final in finals]


def _packed(operator: str, reset_after: bool, kernel: Any, recurrent: Any, bias: Any = None) -> tuple[Any, Any, Any]:  # noqa: ANN401 NumPy arrays
    """Keras has the gates in the columns, and two biases only for a GRU that resets after its product."""
    order = next(gates for name, gates in _OPERATORS.values() if name == operator)
    zeros = np.zeros(kernel.shape[1], np.float32)
    first, second = (zeros, zeros) if bias is None else bias if reset_after else (bias, zeros)

    def gates(array: Any) -> Any:  # noqa: ANN401 a NumPy array
        parts = np.split(array, len(order), axis=-1)
        return np.concatenate([parts[gate] for gate in order], axis=-1)

    both = np.concatenate([gates(first), gates(second)])
    return gates(kernel).T[None], gates(recurrent).T[None], both[None]
