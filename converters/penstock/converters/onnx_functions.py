"""The functions that an ONNX model brings along, written out: what they do is then there for the checks and passes."""

from collections import Counter
from collections.abc import Mapping

import onnx
from onnx import inliner

from penstock.converters.errors import UnsafeFileError
from penstock.converters.gate import nodes_of
from penstock.converters.onnx_file import MAX_NODES

_Name = tuple[str, str, str]


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without functions. Raises `UnsafeFileError` where they call themselves or become too many nodes."""
    if not model.functions:
        return model
    calls = {_name(function): Counter(_called(node) for node in _nodes(function)) for function in model.functions}
    sizes: dict[_Name, int] = {}
    if sum(_size(_called(node), calls, sizes, ()) for node in nodes_of(model.graph)) > MAX_NODES:
        raise UnsafeFileError(
            "node-count", f"The functions of the model stand for more than {MAX_NODES:,} nodes; so many are not read."
        )
    result = inliner.inline_local_functions(model)
    domains = {"", *(node.domain for node in nodes_of(result.graph))}
    imports = [entry for entry in result.opset_import if entry.domain in domains]
    del result.opset_import[:]
    result.opset_import.extend(imports)
    return result


def _size(name: _Name, calls: Mapping[_Name, Counter[_Name]], sizes: dict[_Name, int], above: tuple[_Name, ...]) -> int:
    """The nodes that a call of this function, or of this operator, stands for."""
    if name not in calls:
        return 1
    if name in above:
        raise UnsafeFileError("functions", f"The function {name[1]!r} of the model calls itself, which ONNX forbids.")
    if name not in sizes:
        sizes[name] = sum(count * _size(called, calls, sizes, (*above, name)) for called, count in calls[name].items())
    return sizes[name]


def _nodes(function: onnx.FunctionProto) -> list[onnx.NodeProto]:
    return list(nodes_of(onnx.GraphProto(node=function.node)))


def _name(function: onnx.FunctionProto) -> _Name:
    return function.domain, function.name, function.overload


def _called(node: onnx.NodeProto) -> _Name:
    return node.domain, node.op_type, node.overload
