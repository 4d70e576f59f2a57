"""External data and operators are found wherever a model can hide them, and no bytes make the reader fail otherwise."""

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from google.protobuf.descriptor import Descriptor
from hypothesis import given
from hypothesis import strategies as st
from onnx import helper, numpy_helper

from penstock.inference.onnx_file import _MESSAGES, external_locations, operators
from penstock.rpc.errors import WrongStateError


def tensor(location: str | None) -> onnx.TensorProto:
    made = numpy_helper.from_array(np.ones(300, np.float32), "weight")
    if location is not None:
        onnx.external_data_helper.set_external_data(made, location, offset=0, length=1200)
        made.ClearField("raw_data")
    return made


def graph(*locations: str | None, nodes: tuple[onnx.NodeProto, ...] = ()) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), "graph", [], [], [tensor(location) for location in locations])


def constant(location: str) -> onnx.NodeProto:
    return helper.make_node("Constant", [], ["value"], value=tensor(location))


def branch(location: str) -> onnx.NodeProto:
    inner = graph(location, nodes=(constant(f"{location}.inner"),))
    return helper.make_node("If", ["flag"], ["out"], then_branch=graph(), else_branch=inner)


def sparse(location: str) -> onnx.SparseTensorProto:
    made = onnx.SparseTensorProto(dims=[300])
    made.values.CopyFrom(tensor(location))
    made.indices.CopyFrom(tensor(f"{location}.indices"))
    return made


def with_sparse() -> onnx.ModelProto:
    model = helper.make_model(graph())
    model.graph.sparse_initializer.append(sparse("s"))
    return model


def with_function() -> onnx.ModelProto:
    function = helper.make_function("local", "F", [], ["value"], [constant("f")], [helper.make_opsetid("", 18)])
    return helper.make_model(graph("g"), functions=[function])


def with_lists() -> onnx.ModelProto:
    node = helper.make_node("Custom", [], ["value"])
    node.attribute.append(helper.make_attribute("tensors", [tensor("t1"), tensor("t2")]))
    node.attribute.append(helper.make_attribute("graphs", [graph("g1")]))
    return helper.make_model(graph(nodes=(node,)))


def with_training() -> onnx.ModelProto:
    model = helper.make_model(graph())
    model.training_info.add().initialization.CopyFrom(graph("i"))
    return model


MODELS = {
    "none": (helper.make_model(graph(None)), set()),
    "initializers": (helper.make_model(graph("a", None, "../b", "/etc/passwd")), {"a", "../b", "/etc/passwd"}),
    "a constant": (helper.make_model(graph(nodes=(constant("c"),))), {"c"}),
    "a branch": (helper.make_model(graph(nodes=(branch("b"),))), {"b", "b.inner"}),
    "sparse": (with_sparse(), {"s", "s.indices"}),
    "a function": (with_function(), {"f", "g"}),
    "lists": (with_lists(), {"t1", "t2", "g1"}),
    "training": (with_training(), {"i"}),
}


@pytest.mark.parametrize("case", MODELS)
def test_every_location_is_found(tmp_path: Path, case: str) -> None:
    model, expected = MODELS[case]
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert external_locations(path) == expected


def test_every_way_to_a_tensor_in_the_onnx_package_is_known() -> None:
    """A new way in a later version of the format must not stay unseen."""
    ways: dict[str, dict[int, str]] = {}

    def collect(descriptor: Descriptor) -> None:
        if descriptor.name not in ways:
            ways[descriptor.name] = {one.number: one.message_type.name for one in descriptor.fields if one.message_type}
            for field in descriptor.fields:
                if field.message_type:
                    collect(field.message_type)

    collect(onnx.ModelProto.DESCRIPTOR)
    leading = {"TensorProto"}
    while found := {name for name, inner in ways.items() if leading & set(inner.values())} - leading:
        leading |= found
    expected = {
        name.removesuffix("Proto"): {
            number: target.removesuffix("Proto") for number, target in ways[name].items() if target in leading
        }
        for name in leading - {"TensorProto"}
    }
    read = {
        message: {number: kind for number, kind in inner.items() if kind != "Operator"}
        for message, inner in _MESSAGES.items()
    }
    assert expected == {message: inner for message, inner in read.items() if message != "Tensor"}


@pytest.mark.parametrize(
    ("case", "expected"),
    [("none", set()), ("a branch", {"If", "Constant"}), ("a function", {"Constant"}), ("lists", {"Custom"})],
)
def test_operators_are_found_in_inner_graphs_and_not_in_weights(tmp_path: Path, case: str, expected: set[str]) -> None:
    model = onnx.ModelProto()
    model.CopyFrom(MODELS[case][0])
    weight = onnx.TensorProto(name="text", data_type=onnx.TensorProto.UINT8, dims=[6], raw_data=b"\x22\x04LSTM")
    model.graph.initializer.append(weight)
    path = tmp_path / "model.onnx"
    path.write_bytes(model.SerializeToString())
    assert operators(path) == expected


@pytest.mark.parametrize(
    "data",
    [b"\x3a\x05ab", b"\x3b", b"\xff" * 11, b"\x3a", b"\x39abc", b"\x3a\x02\x2a\x05", b"\xff\xff\xff\xff\x7f\x00"],
)
def test_a_broken_file_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(data)
    with pytest.raises(WrongStateError, match="not an ONNX file"):
        external_locations(path)


@given(data=st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "any.onnx"
    path.write_bytes(data)
    try:
        assert all(isinstance(location, str) for location in external_locations(path))
    except WrongStateError:
        return


def test_many_empty_messages_take_no_memory(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    # Field 7, the graph, of no bytes, over and over.
    path.write_bytes(b"\x3a\x00" * 50_000)
    tracemalloc.start()
    try:
        assert external_locations(path) == set()
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 500_000


def test_a_model_nested_deeper_than_protobuf_reads_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    data = b""
    # From the inside out: a graph in an attribute in a node in a graph …
    for number in (6, 5, 1) * 100:
        length = len(data)
        size = bytes([length]) if length < 128 else bytes([length & 0x7F | 0x80, length >> 7])
        data = bytes([number << 3 | 2]) + size + data
    length = len(data)
    path.write_bytes(b"\x3a" + bytes([length & 0x7F | 0x80, length >> 7]) + data)
    with pytest.raises(WrongStateError, match="deep"):
        external_locations(path)
