"""Lookup tables and text in ONNX: rewriters that tf2onnx runs before it translates operators one by one.

ONNX Runtime's own `Tokenizer` splits text: ONNX's StringSplit knows fewer kinds of white space than TensorFlow, and
nothing of characters. The locale "C" lowers the letters A to Z, as TensorFlow does, and is on every system.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto

from penstock.converters.keras_text import PUNCTUATION
from penstock.converters.source import as_text
from penstock.converters.tf_operators import Nodes, Replacement

STRING_OPSET = 20
"""The first with StringConcat, and with an Equal of texts."""

_ML = "ai.onnx.ml"
_SPLITTERS: dict[str, dict[str, Any]] = {
    "StringSplitV2": {"tokenexp": r"[^ \t\n\v\f\r]+"},
    "UnicodeDecode": {"separators": [""]},
    "UnicodeDecodeWithOffsets": {"separators": [""]},
}
_FIELDS: dict[np.dtype[Any], str] = {np.dtype(np.int64): "int64", np.dtype(object): "string"}

Rewriter = Callable[[Nodes, list[Nodes]], list[Nodes]]


@dataclass(frozen=True)
class Table:
    """What a lookup table of TensorFlow holds: keys and values are int64 or strings."""

    keys: NDArray[Any]
    values: NDArray[Any]


def captured_tables(function: Any, layers: Iterable[Any]) -> dict[str, Table]:  # noqa: ANN401 TensorFlow and Keras publish no types
    """The tables that a traced function reads, by the name of the placeholder that stands for each in its graph."""
    tables = [layer.lookup_table for layer in layers if hasattr(layer, "lookup_table")]
    found = {}
    for outer, inner in function.graph.captures:
        for table in tables:
            if outer is table.resource_handle:
                keys, values = (_values(tensor.numpy()) for tensor in table.export())
                order = np.argsort(keys)  # TensorFlow's own is another in every process
                found[inner.op.name] = Table(keys[order], values[order])
    return found


def rewriters(tables: Mapping[str, Table]) -> list[Rewriter]:
    """In the order in which they must run."""
    return [_each(_split), _each(_lower), _each(_strip), _each(lambda new, node: _look_up(new, node, tables))]


def _each(rewrite: Callable[[Replacement, Nodes], None]) -> Rewriter:
    def rewriter(graph: Nodes, _: list[Nodes]) -> list[Nodes]:
        for node in list(graph.get_nodes()):
            if graph.get_node_by_name(node.name) is not None:
                rewrite(Replacement(graph, node), node)
        graph.delete_unused_nodes(graph.outputs)
        return list(graph.get_nodes())

    return rewriter


def _look_up(new: Replacement, node: Nodes, tables: Mapping[str, Table]) -> None:
    if node.type != "LookupTableFindV2":
        return
    table = tables[next(_upwards(node.inputs[0], "Placeholder")).name]
    default = _values(np.asarray(node.inputs[2].get_tensor_value(as_list=False)))
    keys, values = _FIELDS[table.keys.dtype], _FIELDS[table.values.dtype]
    options = {
        f"keys_{keys}s": table.keys.tolist(),
        f"values_{values}s": table.values.tolist(),
        f"default_{values}": default.item(),
    }
    x = new.inputs[1]
    if keys == "int64":
        x = new("Cast", x, to=TensorProto.INT64)
    new.becomes(new("LabelEncoder", x, domain=_ML, **options))


def _split(new: Replacement, node: Nodes) -> None:
    """A ragged tensor of words or characters that is made dense at once, and padded with the empty string."""
    if node.type != "RaggedTensorToTensor":
        return
    for operator, options in _SPLITTERS.items():
        for splitting in _upwards(node.inputs[1], operator):
            text = new("Reshape", splitting.input[0], new.constant([-1], np.int64))
            new.becomes(new.tokens(text, **options))
            return


def _lower(new: Replacement, node: Nodes) -> None:
    if node.type == "StringLower":
        flat = new("Reshape", new.inputs[0], new.constant([-1], np.int64))
        lowered = new("StringNormalizer", flat, case_change_action="LOWER", locale="C")
        new.becomes(new("Reshape", lowered, new("Shape", new.inputs[0])))


def _strip(new: Replacement, node: Nodes) -> None:
    """ONNX replaces nothing in a text: it is split where punctuation stands, and the pieces are joined in a loop."""
    punctuation = PUNCTUATION.encode()
    if node.type != "StaticRegexReplace" or node.get_attr_value("pattern") != punctuation:
        return
    flat = new("Reshape", new.inputs[0], new.constant([-1], np.int64))
    pieces = new.tokens(flat, separators=[PUNCTUATION])
    joined = new.joined(pieces, new("Expand", new.constant("", object), new("Shape", flat)))
    new.becomes(new("Reshape", joined, new("Shape", new.inputs[0])))


def _upwards(node: Nodes, operator: str) -> Iterator[Nodes]:
    """The nearest nodes of this operator that a node's first inputs come from."""
    while node is not None and node.type != operator:
        node = node.inputs[0] if node.inputs else None
    if node is not None:
        yield node


def _values(array: NDArray[Any]) -> NDArray[Any]:
    return as_text(array) if array.dtype.kind in "OSU" else array.astype(np.int64)
