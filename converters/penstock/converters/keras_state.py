"""Variables that a model changes while it answers: a served graph has none, each answer is the first one."""

from collections.abc import Iterable
from typing import Any

from penstock.converters.errors import UnsupportedModelError

Function = Any  # TensorFlow and Keras publish no types

_READS = {"ReadVariableOp", "ResourceGather"}
_RANDOM_STATE = "seed_generator_state"
"""Of a generator of random numbers. Where its numbers count, the graph has operators that ONNX lacks."""


def check_stateless(function: Function, variables: Iterable[Any]) -> None:
    """Raises `UnsupportedModelError` if an answer depends on a variable that the traced function changes.

    What is changed and not read, as the moving mean is in training, is no part of the answer.
    """
    changed = {
        id(operation.inputs[0])
        for operation in function.graph.get_operations()
        if operation.type.startswith("Assign") and operation.type.endswith("VariableOp")
    }
    if not changed:
        return
    read = {id(handle) for handle in _handles_read(function)} & changed
    captured = {id(outer): inner for outer, inner in function.graph.captures}
    for variable in variables:
        inner = captured.get(id(variable.value.handle))
        if inner is not None and id(inner) in read and not variable.path.endswith(_RANDOM_STATE):
            raise UnsupportedModelError(
                f"The model changes {variable.path!r} as it answers, and its answers depend on it; a served graph has "
                "no state, and each of its answers would be the first. Give it as an input and as an output, or "
                "change it in training only."
            )


def _handles_read(function: Function) -> list[Any]:
    """Of the variables whose values the outputs are made of."""
    handles, waiting, seen = [], [output.op for output in function.graph.outputs], set()
    while waiting:
        operation = waiting.pop()
        if operation.name in seen:
            continue
        seen.add(operation.name)
        if operation.type in _READS:
            handles.append(operation.inputs[0])
        waiting += [tensor.op for tensor in operation.inputs]
    return handles
