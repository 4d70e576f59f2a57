"""Gives a converted graph the model's own names and one order of nodes: converting twice gives the same bytes."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import version

import onnx
from onnx import helper

from penstock.converters.gate import nodes_of
from penstock.converters.signature import Signature, TensorSpec, onnx_type
from penstock.converters.weights import without_weights

IR_VERSION = 10
"""ONNX Runtime loads it since 1.18; opset 18 needs 8."""


def finish(
    model: onnx.ModelProto, signature: Signature, inputs: Sequence[str], outputs: Sequence[str], name: str
) -> onnx.ModelProto:
    """A new model with the same computation whose inputs and outputs are those of the signature.

    `inputs` and `outputs` are the present names of the signature's tensors, in its order; an output may come twice,
    and may be an input. Other tensors and nodes keep their names as far as these are free, without the counters of
    converters.
    """
    graph = without_weights(model).graph
    graph.initializer.extend(onnx.TensorProto(name=constant.name) for constant in model.graph.initializer)
    del graph.output[:]
    graph.output.extend(helper.make_empty_tensor_value_info(present) for present in dict.fromkeys(outputs))
    _bypass_identities(graph, {})
    origins = dict(zip(dict.fromkeys(outputs), [value.name for value in graph.output], strict=True))
    names = {present: spec.name for present, spec in zip(inputs, signature.inputs, strict=True)}
    copies: list[tuple[str, str]] = []
    for present, spec in zip(outputs, signature.outputs, strict=True):
        if origins[present] not in names:
            names[origins[present]] = spec.name
        else:
            copies.append((names[origins[present]], spec.name))
    taken = {spec.name for spec in (*signature.inputs, *signature.outputs)}
    _Renaming(taken).apply(graph, names)
    leaked = [value for value in graph.input if value.name not in taken]  # the gate refuses them, by name
    del graph.input[:], graph.output[:]
    graph.input.extend([*(_value_info(spec) for spec in signature.inputs), *leaked])
    graph.output.extend(_value_info(spec) for spec in signature.outputs)
    graph.node.extend(helper.make_node("Identity", [first], [copy], name=copy) for first, copy in copies)
    graph.name, graph.doc_string = name, ""
    domains = {node.domain for node in nodes_of(graph)} | {""}
    finished = helper.make_model(
        graph,
        producer_name="penstock",
        producer_version=version("penstock"),
        ir_version=IR_VERSION,
        opset_imports=sorted(
            (entry for entry in model.opset_import if entry.domain in domains), key=lambda entry: str(entry.domain)
        ),
    )
    weights = {names[constant.name]: constant for constant in model.graph.initializer if constant.name in names}
    for constant in finished.graph.initializer:
        named = constant.name
        constant.CopyFrom(weights[named])
        constant.name, constant.doc_string = named, ""
    return finished


def _value_info(spec: TensorSpec) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(spec.name, onnx_type(spec.datatype), list(spec.shape))


class _Renaming:
    """Renames a graph and the graphs inside it. No two tensors share a name, and no two nodes, wherever they stand."""

    def __init__(self, taken: Iterable[str]) -> None:
        self._tensors = set(taken)
        self._nodes: set[str] = set()

    def apply(self, graph: onnx.GraphProto, names: dict[str, str]) -> None:
        """Orders and renames a graph in place; `names` holds what is named already and takes up what is new."""
        nodes = _in_order(graph)
        for value in graph.input:
            value.name = self._named(value.name, value.name, names)
        constants = {constant.name: constant for constant in graph.initializer}
        used = dict.fromkeys(tensor for node in nodes for tensor in _needed(node))
        used |= dict.fromkeys(value.name for value in graph.output)
        kept = [constants[tensor] for tensor in used if tensor in constants]
        for constant in kept:
            constant.name, constant.doc_string = self._named(constant.name, constant.name, names), ""
        for node in nodes:
            self._rename_node(node, names)
        for value in graph.output:
            value.name = names[value.name]
        for value in (*graph.input, *graph.output):
            for axis in value.type.tensor_type.shape.dim:
                axis.ClearField("dim_param")  # a converter's counter; only the model's own axes have names
        # A copy: clearing the field empties the messages it holds.
        copy = onnx.GraphProto(node=nodes, initializer=kept)
        del graph.node[:], graph.initializer[:], graph.value_info[:]
        graph.node.extend(copy.node)
        graph.initializer.extend(copy.initializer)

    def _rename_node(self, node: onnx.NodeProto, names: dict[str, str]) -> None:
        node.name = _free(_without_counter(node.name), self._nodes)
        self._nodes.add(node.name)
        node.doc_string = ""
        node.input[:] = [names[tensor] if tensor else "" for tensor in node.input]
        # Not the tensors' own names: which of several equal ones survived a converter's optimizer is chance.
        wishes = [f"{node.name}:{index}" if index else node.name for index in range(len(node.output))]
        node.output[:] = [
            self._named(tensor, wish, names) if tensor else "" for tensor, wish in zip(node.output, wishes, strict=True)
        ]
        attributes = sorted(node.attribute, key=lambda attribute: str(attribute.name))
        for attribute in attributes:
            for body in _bodies(attribute):
                body.name, body.doc_string = f"{node.name}/{attribute.name}", ""
                self.apply(body, dict(names))
        copy = onnx.NodeProto(attribute=attributes)
        del node.attribute[:]
        node.attribute.extend(copy.attribute)

    def _named(self, tensor: str, wish: str, names: dict[str, str]) -> str:
        if tensor not in names:
            names[tensor] = _free(_without_counter(wish), self._tensors)
            self._tensors.add(names[tensor])
        return names[tensor]


def _bypass_identities(graph: onnx.GraphProto, outer: Mapping[str, str]) -> None:
    """Leaves only those Identity nodes without which an output would be an input, a constant, or another output too."""
    origins = dict(outer)
    kept: list[onnx.NodeProto] = []
    for node in graph.node:
        node.input[:] = [origins.get(tensor, tensor) for tensor in node.input]
        for attribute in node.attribute:
            for body in _bodies(attribute):
                _bypass_identities(body, origins)
        if node.op_type == "Identity" and not node.domain:
            origins[node.output[0]] = node.input[0]
        else:
            kept.append(node)
    free = {tensor for node in kept for tensor in node.output}
    taken = {*free, *(value.name for value in (*graph.input, *graph.initializer)), *origins}
    for value in graph.output:
        origin = origins.get(value.name, value.name)
        if origin in free:
            free.remove(origin)
            value.name = origin
        else:
            value.name = _free(value.name, taken)
            taken.add(value.name)
            kept.append(helper.make_node("Identity", [origin], [value.name], name="Identity"))
    copy = onnx.GraphProto(node=kept)
    del graph.node[:]
    graph.node.extend(copy.node)


def _in_order(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The nodes that the outputs need, each behind those it needs, in an order that depends on the structure alone."""
    producers = {tensor: node for node in graph.node for tensor in node.output if tensor}
    ordered: list[onnx.NodeProto] = []
    entered: set[int] = set()
    pending = [(producers[value.name], False) for value in reversed(graph.output) if value.name in producers]
    while pending:
        node, is_ready = pending.pop()
        if is_ready:
            ordered.append(node)
        elif id(node) not in entered:  # a cycle ends here, and at the checker
            entered.add(id(node))
            pending.append((node, True))
            pending += [(producers[tensor], False) for tensor in reversed(list(_needed(node))) if tensor in producers]
    return ordered


def _needed(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors a node reads, those that the graphs inside it take from outside too."""
    yield from node.input
    for attribute in node.attribute:
        for body in _bodies(attribute):
            for inner in nodes_of(body):
                yield from inner.input
            yield from (value.name for value in body.output)


def _bodies(attribute: onnx.AttributeProto) -> Iterator[onnx.GraphProto]:
    if attribute.HasField("g"):
        yield attribute.g
    yield from attribute.graphs


def _without_counter(name: str) -> str:
    """tf2onnx counts in `x__12` and writes memory addresses into `einsum…`, TensorFlow counts in `…_frozen_345`.

    skl2onnx counts the loops over neighbours of a process, `cdistd_7`.
    """
    return (
        re.sub(r"__\d+|(?<=_frozen)_\d+|(?<=einsum)\d+|(?<=cdistd)_\d+|(?<=cdistdf)_\d+", "", name).removesuffix(":0")
        or "tensor"
    )


def _free(name: str, taken: set[str]) -> str:
    if name not in taken:
        return name
    number = 1
    while f"{name}_{number}" in taken:
        number += 1
    return f"{name}_{number}"
