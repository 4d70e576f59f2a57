"""Graphs in float16 that end ONNX Runtime's process, unless they are written otherwise."""

from pathlib import Path

import keras
import numpy as np
import onnx
import pytest
from keras import layers
from onnx import TensorProto, helper

from penstock.converters import convert
from penstock.converters.fusion import optimize
from penstock.converters.runtime import Runtime


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("axes", [(1, 0, 2), (1, 2, 0, 3)])
def test_product_of_rows_whose_batch_was_moved(axes: tuple[int, ...], is_first: bool, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = random.standard_normal((*(2, 3, 4)[: len(axes) - 1], 4)).astype(np.float16)
    moved = rows.transpose(axes)
    weight = random.standard_normal((4, 5) if is_first else (5, moved.shape[-2])).astype(np.float16)
    nodes = [
        helper.make_node("Relu", ["x"], ["positive"]),
        helper.make_node("Transpose", ["positive"], ["moved"], perm=axes),
        helper.make_node("MatMul", ["moved", "weight"] if is_first else ["weight", "moved"], ["y"]),
    ]
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.FLOAT16, [None] * len(axes[:-1]) + [4 if name == "x" else None])
        for name in "xy"
    )
    graph = helper.make_graph(nodes, "graph", [x], [y], [onnx.numpy_helper.from_array(weight, "weight")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    once = optimize(model)
    assert optimize(once).SerializeToString() == once.SerializeToString()
    onnx.save(once, tmp_path / "model.onnx")
    with Runtime(tmp_path / "model.onnx") as runtime:
        answer = runtime.answer({"x": rows})["y"]
    positive = np.maximum(moved, 0)
    np.testing.assert_allclose(answer, positive @ weight if is_first else weight @ positive, rtol=1e-2, atol=1e-2)


def test_masked_recurrent_layer_in_front_of_a_dense_one(tmp_path: Path) -> None:
    ids = keras.Input((6,), dtype="int32", name="ids")
    words = layers.Embedding(10, 4, mask_zero=True, dtype="mixed_float16")(ids)
    steps = layers.LSTM(3, return_sequences=True, dtype="mixed_float16")(words)
    scores = layers.Dense(2, dtype="mixed_float16")(steps)
    conversion = convert(keras.Model(ids, scores), tmp_path / "model.onnx")
    assert {case.rows for case in conversion.parity.cases} >= {"random", "padded"}
