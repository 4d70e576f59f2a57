"""Graphs that are wrong in one way each, made by hand."""

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper

from penstock.converters import GateError, Signature, TensorSpec, Tolerance
from penstock.converters.gate import verify
from penstock.converters.naming import finish
from penstock.converters.parity import Batch
from penstock.converters.probe import Examination

SIGNATURE = Signature((TensorSpec("x", "FP32", ("batch", 2)),), (TensorSpec("y", "FP32", ("batch", 2)),))
ROWS = np.asarray([[1, 2], [3, 4]], np.float32)
ASKED = Examination(SIGNATURE, (Batch("random", 2, {"x": ROWS}, {"y": ROWS + 1}),), ())


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
    report = verify(adder(), ASKED, None, "by hand")
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
        verify(build(), ASKED, None, "by hand")


def test_a_leaked_input_survives_the_naming() -> None:
    model = finish(leaked_constant(), SIGNATURE, ["x"], ["y"], "adder")
    with pytest.raises(GateError, match="asks its caller for 'one'"):
        verify(model, ASKED, None, "by hand")


def test_names_that_collide_with_inner_ones() -> None:
    signature = Signature((TensorSpec("one", "FP32", ("batch", 2)),), (TensorSpec("add", "FP32", ("batch", 2)),))
    model = finish(adder(), signature, ["x"], ["y"], "adder")
    asked = Examination(signature, (Batch("random", 2, {"one": ROWS}, {"add": ROWS + 1}),), ())
    assert verify(model, asked, None, "by hand").max_absolute_error == 0.0
    assert [constant.name for constant in model.graph.initializer] == ["one_1"]


def test_axes_of_one_name_must_agree() -> None:
    signature = Signature(
        (TensorSpec("x", "FP32", ("batch", "batch")),), (TensorSpec("y", "FP32", ("batch", "batch")),)
    )
    model = finish(adder(), signature, ["x"], ["y"], "adder")
    rows = np.zeros((2, 3), np.float32)
    asked = Examination(signature, (Batch("random", 2, {"x": rows}, {"y": rows + 1}),), ())
    with pytest.raises(GateError, match=r"shape \[2, 3\]"):
        verify(model, asked, None, "by hand")


def test_a_warning_that_means_a_wrong_graph_lets_none_pass() -> None:
    model = adder()
    model.graph.initializer.append(helper.make_tensor("unused", TensorProto.FLOAT, [1], [0.0]))
    with pytest.raises(GateError, match=r"warns of the graph: .*'unused'.*not used by any node"):
        verify(model, ASKED, None, "by hand")


def test_other_warnings_are_in_the_report(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.converters.gate._FAULTS", ())
    model = adder()
    model.graph.initializer.append(helper.make_tensor("unused", TensorProto.FLOAT, [1], [0.0]))
    assert any("'unused'" in warning for warning in verify(model, ASKED, None, "by hand").warnings)


def test_rows_that_end_the_process_of_onnx_runtime_do_not_end_ours() -> None:
    signature = Signature((TensorSpec("x", "FP32", (5, "batch", 3)),), (TensorSpec("y", "FP32", (5, 1, "batch", 2)),))
    weights = [
        helper.make_tensor("W", TensorProto.FLOAT, [1, 8, 3], np.ones(24)),
        helper.make_tensor("R", TensorProto.FLOAT, [1, 8, 2], np.ones(16)),
    ]
    graph = helper.make_graph(
        [helper.make_node("LSTM", ["x", "W", "R"], ["y"], hidden_size=2)],
        "lstm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, "batch", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 1, "batch", 2])],
        weights,
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    no_steps = Batch("random", 1, {"x": np.zeros((5, 1, 3), np.float32)}, {"y": np.zeros((5, 1, 1, 2), np.float32)})
    empty = Batch("empty", 0, {"x": np.zeros((5, 0, 3), np.float32)}, {"y": np.zeros((5, 1, 0, 2), np.float32)})
    report = verify(model, Examination(signature, (no_steps, empty), ()), Tolerance(10, 10), "by hand")
    assert [(kind.rows, kind.reason) for kind in report.skipped] == [
        ("empty", "ONNX Runtime cannot run them: its process ended by SIGABRT")
    ]


def test_nan_is_left_out_only_where_onnx_leaves_it_open() -> None:
    asked = Examination(SIGNATURE, (*ASKED.batches, Batch("nan", 2, {"x": ROWS * np.nan}, {"y": ROWS})), ())
    with pytest.raises(GateError, match="2 nan rows"):
        verify(adder(), asked, None, "by hand")
    (kind,) = verify(adder(operator="Max", constant=-9.0), _largest(asked), None, "by hand").skipped
    assert (kind.rows, kind.reason) == ("nan", "ONNX leaves open what Max makes of NaN: 'y' differs in row 0")


def _largest(asked: Examination) -> Examination:
    """The rows are above the constant: their maximum with it are they themselves."""
    random, nan = asked.batches
    return Examination(asked.signature, (Batch("random", 2, random.inputs, {"y": ROWS}), nan), ())


def test_nan_in_an_output_that_no_such_operator_makes_is_compared() -> None:
    model = adder()
    model.graph.node.append(helper.make_node("Max", ["x", "one"], ["z"], name="largest"))
    model.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 2]))
    signature = Signature(SIGNATURE.inputs, (*SIGNATURE.outputs, TensorSpec("z", "FP32", ("batch", 2))))
    random = Batch("random", 2, {"x": ROWS}, {"y": ROWS + 1, "z": np.maximum(ROWS, 1)})
    without = np.full_like(ROWS, np.nan)

    def asked(**answers: NDArray[np.float32]) -> Examination:
        return Examination(signature, (random, Batch("nan", 2, {"x": without}, answers)), ())

    (kind,) = verify(model, asked(y=without, z=ROWS), None, "by hand").skipped
    assert kind.rows == "nan"
    with pytest.raises(GateError, match=r"'y' differs.*2 nan rows"):
        verify(model, asked(y=ROWS, z=without), None, "by hand")
