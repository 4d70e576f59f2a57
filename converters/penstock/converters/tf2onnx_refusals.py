"""Why a model cannot be translated, for who built it: the layer or the operation, and what to do instead."""

import logging
import re
from collections.abc import Iterator, Mapping, Sequence

import onnx

_PLACES_NAMED = 3

_BY_VOCABULARY = "ONNX has no hash of a text: use StringLookup or IntegerLookup with a vocabulary there."
_BEFORE = "ONNX multiplies matrices and no more: compute it before the model is called, or once, as a weight."
_SIMPLE_RESIZING = "Resize with the interpolation 'bilinear', 'bicubic' or 'nearest', without antialias, there."
_LOOP = (
    "Of loops, only recurrent layers give what each of their steps made: use one of them, or keras.ops.cumsum, there."
)
_RANDOM = "What a model draws at random cannot be compared: give it as an input."

_INSTEAD = {
    "Cholesky": _BEFORE,
    "IRFFT": "ONNX has the transform back to complex numbers only: compute it after the model was called.",
    "MatrixInverse": _BEFORE,
    "MatrixSolve": _BEFORE,
    "Qr": _BEFORE,
    "ResizeArea": _SIMPLE_RESIZING,
    "ScaleAndTranslate": _SIMPLE_RESIZING,
    "SelfAdjointEigV2": _BEFORE,
    "SparseCross": _BY_VOCABULARY,
    "StatelessRandomNormalV2": _RANDOM,
    "StatelessRandomUniformV2": _RANDOM,
    "StringToHashBucketFast": _BY_VOCABULARY,
    "StringToHashBucketStrong": _BY_VOCABULARY,
    "Svd": _BEFORE,
    "StatelessWhile": _LOOP,
    "While": _LOOP,
    "_SwitchN": "Use keras.ops.cond, one inside the other, there.",
}
"""What to do, by the operator that ONNX lacks."""

_OPERATIONS = {
    "Cholesky": "cholesky",
    "Cumprod": "cumprod",
    "IRFFT": "irfft",
    "MatrixInverse": "inv",
    "MatrixSolve": "solve",
    "Qr": "qr",
    "SelfAdjointEigV2": "eigh",
    "Svd": "svd",
    "_SwitchN": "switch",
}
"""What of `keras.ops` an operator is of, where the graph does not say it."""


def lacking(nodes: Sequence[onnx.NodeProto], layers: frozenset[str], opset: int) -> str:
    """That ONNX has not the operators of these nodes."""
    places = dict.fromkeys(f"{node.op_type} in {_place(node.name, node.op_type, layers)}" for node in nodes)
    hints = (_INSTEAD[node.op_type] for node in nodes if node.op_type in _INSTEAD)
    return (
        f"ONNX opset {opset} cannot say what these layers do: {_listed(list(places))}. "
        f"{next(hints, 'Use other layers there.')}"
    )


def failed(errors: Sequence[logging.LogRecord], operators: Mapping[str, str], layers: frozenset[str]) -> str:
    """What tf2onnx failed at, by its log; `operators` has those of TensorFlow's nodes by name."""
    failures = list(_failures(errors, operators))
    places = dict.fromkeys(
        f"{operator} in {_place(name, operator, layers)}" + (f" ({cause})" if cause else "")
        for name, operator, cause in failures
    )
    hints = (_INSTEAD[operator] for _, operator, _ in failures if operator in _INSTEAD)
    said = _listed(list(places)) if places else "; ".join(record.getMessage().splitlines()[0] for record in errors)
    return (
        f"tf2onnx cannot translate the model: {said}. {next(hints, 'Use other layers, or others of keras.ops, there.')}"
    )


def _failures(errors: Sequence[logging.LogRecord], operators: Mapping[str, str]) -> Iterator[tuple[str, str, str]]:
    for record in errors:
        if record.msg.startswith("Failed to convert node") and isinstance(record.args, tuple):
            # TensorFlow puts the branches of a condition into the graph around it.
            name = str(record.args[0]).partition("_tfg_inlined_")[0]
            cause = record.exc_info[1] if record.exc_info else None
            yield name, operators.get(name, "a node"), str(cause or "").removeprefix("make_sure failure: ")


def _listed(places: Sequence[str]) -> str:
    return ", ".join(places[:_PLACES_NAMED]) + (" and others" if len(places) > _PLACES_NAMED else "")


def _place(node_name: str, operator: str, layers: frozenset[str]) -> str:
    if layer := _layer_of(node_name, layers):
        return repr(layer)
    return f"keras.ops.{_OPERATIONS[operator]}" if operator in _OPERATIONS else repr(node_name)


def _layer_of(node_name: str, layers: frozenset[str]) -> str | None:
    """TensorFlow's scopes are the layers' names, with `_1` behind them where a scope is entered again."""
    for scope in reversed(node_name.split("/")):
        for name in (scope, re.sub(r"_\d+$", "", scope)):
            if name in layers:
                return name
    return None
