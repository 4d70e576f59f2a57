"""Graphs that are wrong in one way each, made by hand."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from penstock.converters import GateError, Signature, TensorSpec, Tolerance
from penstock.converters.gate import verify
from penstock.converters.naming import finish
from penstock.converters.parity import Batch

SIGNATURE = Signature((TensorSpec("x", "FP32", ("batch", 2)),), (TensorSpec("y", "FP32", ("batch", 2)),))
ROWS = np.asarray([[1, 2], [3, 4]], np.float32)
BATCHES = [Batch("random", 2, {"x": ROWS}, {"y": ROWS + 1})]


def adder(**changes: object) -> onnx.ModelProto:
    """A graph that computes x + 1, with the changes that a case asks for."""
    graph = helper.make_graph(
        [helper.make_node(str(changes.get("operator", "Add")), ["x", "one"], ["y"], name="add")],
        "adder",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, changes.get("output_shape", ["batch", 2]))],
        [helper.make_tensor("one", TensorProto.FLOAT, [1], [changes.get("constant", 1.0)])],
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def leaked_constant() -> onnx.ModelProto:
    model = adder()
    del model.graph.initializer[:]
    model.graph.input.append(helper.make_tensor_value_info("one", TensorProto.FLOAT, [1]))
    return model


def test_the_right_graph_passes() -> None:
    report = verify(adder(), SIGNATURE, BATCHES, Tolerance(), "by hand")
    assert report.max_absolute_error == 0.0
    assert report.source == "by hand"
    assert report.runtime.startswith("onnxruntime 1.")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: adder(operator="Erfc"), r"does not have: ai\.onnx\.Erfc"),
        (lambda: adder(operator="Relu"), "checker refuses"),
        (leaked_constant, "asks its caller for 'one'"),
        (lambda: adder(output_shape=["rows", 2]), r"expected y FP32 \[batch, 2\], got y FP32 \[rows, 2\]"),
        (lambda: adder(constant=2.0), r"'y' differs.*row 0"),
        (lambda: adder(constant=float("nan")), r"'y' differs.*got nan"),
    ],
)
def test_a_wrong_graph_does_not(build: Callable[[], onnx.ModelProto], message: str) -> None:
    with pytest.raises(GateError, match=message):
        verify(build(), SIGNATURE, BATCHES, Tolerance(), "by hand")


def test_a_leaked_input_survives_the_naming() -> None:
    model = finish(leaked_constant(), SIGNATURE, ["x"], ["y"], "adder")
    with pytest.raises(GateError, match="asks its caller for 'one'"):
        verify(model, SIGNATURE, BATCHES, Tolerance(), "by hand")


def test_names_that_collide_with_inner_ones() -> None:
    signature = Signature((TensorSpec("one", "FP32", ("batch", 2)),), (TensorSpec("add", "FP32", ("batch", 2)),))
    model = finish(adder(), signature, ["x"], ["y"], "adder")
    batches = [Batch("random", 2, {"one": ROWS}, {"add": ROWS + 1})]
    assert verify(model, signature, batches, Tolerance(), "by hand").max_absolute_error == 0.0
    assert [constant.name for constant in model.graph.initializer] == ["one_1"]


def test_axes_of_one_name_must_agree() -> None:
    signature = Signature(
        (TensorSpec("x", "FP32", ("batch", "batch")),), (TensorSpec("y", "FP32", ("batch", "batch")),)
    )
    model = finish(adder(), signature, ["x"], ["y"], "adder")
    rows = np.zeros((2, 3), np.float32)
    with pytest.raises(GateError, match=r"shape \[2, 3\]"):
        verify(model, signature, [Batch("random", 2, {"x": rows}, {"y": rows + 1})], Tolerance(), "by hand")
