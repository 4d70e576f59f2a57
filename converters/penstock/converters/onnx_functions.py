"""The functions that an ONNX model brings along, written out: what they do is then there for the checks and passes."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import onnx
from onnx import inliner

from penstock.converters.errors import UnsafeFileError

_MAX_DEPTH = 100

_Name = tuple[str, str, str]


MAX_NODES = 50_000
"""ONNX Runtime's work grows faster than the number of nodes. The largest language models have some ten thousand."""


def check_functions(model: onnx.ModelProto, name: str) -> None:
    """Raises `UnsafeFileError` where functions call themselves or stand for too many nodes: each may call two more."""
    if not model.functions:
        return
    calls = {_name(function): Counter(map(_called, all_nodes(function.node))) for function in model.functions}
    sizes: dict[_Name, int] = {}
    roots = [*calls, *map(_called, all_nodes(model.graph.node))]
    if sum(_size(root, calls, sizes, ()) for root in roots) > MAX_NODES:
        raise UnsafeFileError(
            "node-count", f"{name} has functions that stand for more than {MAX_NODES:,} nodes; so many are not read."
        )


def all_nodes(*levels: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Every node, also of graphs inside, without recursion: depth is the attacker's choice."""
    pending = [iter(level) for level in levels]
    while pending:
        for node in pending.pop():
            yield node
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(iter(attribute.g.node))
                pending += [iter(graph.node) for graph in attribute.graphs]


def inlined(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model, which has been through `check_functions`, without functions."""
    if not model.functions:
        return model
    result = inliner.inline_local_functions(model)
    domains = {"", *(node.domain for node in all_nodes(result.graph.node))}
    imports = [entry for entry in result.opset_import if entry.domain in domains]
    del result.opset_import[:]
    result.opset_import.extend(imports)
    return result


def _size(name: _Name, calls: Mapping[_Name, Counter[_Name]], sizes: dict[_Name, int], above: tuple[_Name, ...]) -> int:
    """The nodes that a call of this function, or of this operator, stands for."""
    if name not in calls:
        return 1
    if name in above or len(above) > _MAX_DEPTH:
        raise UnsafeFileError(
            "functions", f"The function {name[1]!r} of a model calls itself, or others {_MAX_DEPTH} deep."
        )
    if name not in sizes:
        sizes[name] = sum(count * _size(called, calls, sizes, (*above, name)) for called, count in calls[name].items())
    return sizes[name]


def _name(function: onnx.FunctionProto) -> _Name:
    return function.domain, function.name, function.overload


def _called(node: onnx.NodeProto) -> _Name:
    return node.domain, node.op_type, node.overload
