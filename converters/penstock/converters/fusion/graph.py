"""A graph as the passes see it: who makes a tensor, who reads it, what is constant, what shape is known."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from penstock.converters.gate import RUNTIME_DOMAIN, nodes_of, tensors_read
from penstock.converters.weights import without_weights

_FOLDED_ELEMENTS = 1024
"""Shape inference needs the values of small constants only: the sizes of a Reshape, the axes of a ReduceMean."""

Shape = tuple[int | str | None, ...]


class Graph:
    """A model to be changed: a copy that shares the model's weights until it is finished.

    Only the nodes of the graph itself change, not those of graphs inside them.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = without_weights(model)
        self._graph = self._model.graph
        self._constants = {constant.name: constant for constant in model.graph.initializer}
        self._kept = {value.name for value in (*self._graph.input, *self._graph.output)}
        self._index()

    def nodes(self, *operators: str) -> Iterator[onnx.NodeProto]:
        """The nodes of these operators of ONNX that are there now, less those that go in the meantime."""
        for node in list(self._nodes.values()):
            if node.op_type in operators and not node.domain and id(node) in self._nodes:
                yield node

    def made_by(self, tensor: str, *operators: str) -> onnx.NodeProto | None:
        """The node that makes a tensor, if it is one of these operators of ONNX."""
        node = self._producers.get(tensor)
        return node if node is not None and node.op_type in operators and not node.domain else None

    def readers(self, tensor: str) -> list[onnx.NodeProto]:
        return list(self._readers[tensor])

    def is_inner(self, tensor: str) -> bool:
        """Whether the tensor is neither an input nor an output of the model."""
        return tensor not in self._kept

    def is_only_for(self, tensor: str, reader: onnx.NodeProto) -> bool:
        """Whether nobody but this node reads the tensor."""
        return self.is_inner(tensor) and all(node is reader for node in self._readers[tensor])

    def constant(self, tensor: str) -> NDArray[Any] | None:
        """The value of an initializer that no caller can replace, or of a Constant node."""
        if tensor in self._constants:
            value: NDArray[Any] = numpy_helper.to_array(self._constants[tensor])
            return None if tensor in self._kept else value
        node = self.made_by(tensor, "Constant")
        attribute = node.attribute[0] if node is not None and len(node.attribute) == 1 else None
        return numpy_helper.to_array(attribute.t) if attribute is not None and attribute.name == "value" else None

    def shape(self, tensor: str) -> Shape | None:
        """The sizes that are known: a number, a name, or None. None as a whole if not even the rank is known."""
        return self._values[tensor][1] if tensor in self._values else None

    def has_rank_of(self, tensor: str, other: str) -> bool:
        """Whether both are known to have as many axes: a constant with more of them gives its reader more, too."""
        shape, its = self.shape(tensor), self.shape(other)
        return shape is not None and its is not None and len(shape) == len(its)

    def datatype(self, tensor: str) -> int | None:
        """The `onnx.TensorProto.DataType`, if it is known."""
        return self._values[tensor][0] if tensor in self._values else None

    def operands(self, node: onnx.NodeProto) -> Iterator[tuple[str, str]]:
        """The two inputs of a node to whom their order is nothing, both ways round."""
        first, second = node.input
        yield first, second
        yield second, first

    def add(
        self,
        operator: str,
        inputs: Sequence[str],
        name: str,
        output: str | None = None,
        domain: str = "",
        **attributes: Any,  # noqa: ANN401 attributes are of many types
    ) -> str:
        """Adds a node. Its output takes the place of the tensor `output`, whose node goes, or is new."""
        if output is None:
            output = self._free(name)
        else:
            self._unlink(self._producers[output])
        node = helper.make_node(operator, list(inputs), [output], self._free(name), domain=domain, **attributes)
        self._link(node)
        return output

    def copy(self, node: onnx.NodeProto, inputs: Sequence[str], output: str) -> None:
        """Adds a node like another one, with its attributes, that takes the place of what makes the tensor `output`."""
        attributes = {found.name: helper.get_attribute_value(found) for found in node.attribute}
        self.add(node.op_type, inputs, node.name, output, node.domain, **attributes)

    def add_constant(self, value: Any, name: str, dtype: Any = None) -> str:  # noqa: ANN401 whatever NumPy makes an array of
        array = np.asarray(value, dtype)
        name = self._free(name)
        self._constants[name] = numpy_helper.from_array(array, name)
        self._values[name] = self._constants[name].data_type, array.shape
        return name

    def declare(self, tensor: str, shape: Shape) -> None:
        """Notes the shape of a new float32 tensor that ONNX cannot infer: it does not know the operator."""
        self._declared.append(helper.make_tensor_value_info(tensor, onnx.TensorProto.FLOAT, shape))

    def know(self, tensor: str, datatype: int | None, shape: Shape) -> None:
        """Notes what a new tensor is, for whoever asks in the same pass."""
        if datatype is not None:
            self._values[tensor] = datatype, shape

    def redirect(self, tensor: str, other: str) -> None:
        """Lets all readers of a tensor read another one."""
        for node in self.readers(tensor):
            self._unlink(node)
            node.input[:] = [other if name == tensor else name for name in node.input]
            self._link(node)

    def renew(self) -> None:
        """Puts the nodes in order, leaves out what no output needs, and infers shapes anew."""
        self._prune()
        self._index()

    def finish(self) -> onnx.ModelProto:
        """The model with its nodes in order and without what no output needs. The graph is not to be used any more."""
        self._prune()
        self._graph.initializer.extend(self._constants.values())
        return self._model

    def _prune(self) -> None:
        nodes = self._needed_in_order()
        read = {tensor for node in nodes for tensor in tensors_read(node)} | self._kept
        self._constants = {name: constant for name, constant in self._constants.items() if name in read}
        domains = {node.domain for node in nodes_of(onnx.GraphProto(node=nodes))}
        if RUNTIME_DOMAIN in domains - {entry.domain for entry in self._model.opset_import}:
            self._model.opset_import.append(helper.make_opsetid(RUNTIME_DOMAIN, 1))
        made = {tensor for node in nodes for tensor in node.output}
        declared = [value for value in self._declared if value.name in made]
        copy = onnx.GraphProto(node=nodes, value_info=declared)
        del self._graph.node[:], self._graph.value_info[:]
        self._graph.node.extend(copy.node)
        self._graph.value_info.extend(copy.value_info)

    def _index(self) -> None:
        self._values = _inferred_values(self._model, self._constants.values())
        self._names = {tensor for node in nodes_of(self._graph) for tensor in (*node.output, node.name)}
        self._names |= {*self._constants, *self._kept}
        self._declared = list(self._graph.value_info)
        self._nodes: dict[int, onnx.NodeProto] = {}
        self._producers: dict[str, onnx.NodeProto] = {}
        self._readers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in self._graph.node:
            self._link(node)
        self.has_changed = False

    def _link(self, node: onnx.NodeProto) -> None:
        self.has_changed = True
        self._nodes[id(node)] = node
        self._producers.update((tensor, node) for tensor in node.output if tensor)
        for tensor in dict.fromkeys(tensors_read(node)):
            self._readers[tensor].append(node)

    def _unlink(self, node: onnx.NodeProto) -> None:
        del self._nodes[id(node)]
        for tensor in node.output:
            self._producers.pop(tensor, None)
        for tensor in dict.fromkeys(tensors_read(node)):
            self._readers[tensor] = [reader for reader in self._readers[tensor] if reader is not node]

    def _needed_in_order(self) -> list[onnx.NodeProto]:
        """Each node behind those it reads from, else in the order of the outputs; a cycle is left to the checker."""
        ordered: list[onnx.NodeProto] = []
        entered: set[int] = set()
        pending = [(self._producers.get(value.name), False) for value in reversed(self._graph.output)]
        while pending:
            node, is_ready = pending.pop()
            if node is None:
                continue
            if is_ready:
                ordered.append(node)
            elif id(node) not in entered:
                entered.add(id(node))
                pending.append((node, True))
                pending += [(self._producers.get(tensor), False) for tensor in reversed(list(tensors_read(node)))]
        return ordered

    def _free(self, name: str) -> str:
        free, number = name, 0
        while free in self._names:
            number += 1
            free = f"{name}_{number}"
        self._names.add(free)
        return free


def attribute(node: onnx.NodeProto, name: str, default: Any = None) -> Any:  # noqa: ANN401 attributes are of many types
    return next((helper.get_attribute_value(found) for found in node.attribute if found.name == name), default)


def _inferred_values(model: onnx.ModelProto, constants: Collection[onnx.TensorProto]) -> dict[str, tuple[int, Shape]]:
    """Inferred where weights are inputs: their values say nothing about shapes, and may be gigabytes."""
    slim = onnx.ModelProto()
    slim.CopyFrom(model)
    given = {value.name for value in model.graph.input}
    for constant in constants:
        if np.prod(constant.dims, dtype=np.int64) <= _FOLDED_ELEMENTS:
            slim.graph.initializer.append(constant)
        elif constant.name not in given:
            slim.graph.input.append(
                helper.make_tensor_value_info(constant.name, constant.data_type, list(constant.dims))
            )
    inferred = onnx.shape_inference.infer_shapes(slim, data_prop=True).graph
    values: dict[str, tuple[int, Shape]] = {
        constant.name: (constant.data_type, tuple(constant.dims)) for constant in constants
    }
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        tensor = value.type.tensor_type
        if tensor.HasField("shape"):
            sizes = (
                axis.dim_value if axis.HasField("dim_value") else axis.dim_param or None for axis in tensor.shape.dim
            )
            values[value.name] = tensor.elem_type, tuple(sizes)
    return values
