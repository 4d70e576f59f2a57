"""Integers below zero and above what float32 holds: the file answers like Keras, and the gate asks for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import onnxruntime
import pytest
from keras import layers, ops
from numpy.typing import NDArray

from penstock.converters import convert
from penstock.converters.parity import Batch
from penstock.converters.probe import probe
from penstock.converters.sources import open_source

Model = Any  # Keras publishes no types

IDS = [[-1, 0, 7], [5, -(2**24) - 3, 123456789], [2**24 + 1, 2**24 + 2, 3]]
MASKED = [[0], [1], [9], [5], [-1]]


def around(call: Callable[[Any], Any], dtype: str = "int64", columns: int | None = 3) -> Model:
    ids = keras.Input((columns,), dtype=dtype, name="ids")
    return keras.Model(ids, call(ids))


def looked_up(columns: int) -> Model:
    return around(
        layers.IntegerLookup(vocabulary=[1, 2, 5], mask_token=0, output_mode="one_hot"), "int64", columns=columns
    )


EXACT: list[tuple[str, Callable[[], Model], list[list[int]]]] = [
    ("one_hot", lambda: around(lambda ids: ops.one_hot(ids, 6)), IDS),
    ("one_hot-of-integers", lambda: around(lambda ids: ops.one_hot(ids, 6, dtype="int32"), "int32"), IDS),
    ("one_hot-of-booleans", lambda: around(lambda ids: ops.one_hot(ids, 6, dtype="bool"), "int32"), IDS),
    ("one_hot-in-half", lambda: around(lambda ids: ops.one_hot(ids, 6, dtype="float16"), "int32"), IDS),
    ("one_hot-on-another-axis", lambda: around(lambda ids: ops.one_hot(ids, 6, axis=1), "int32"), IDS),
    ("category", lambda: around(layers.CategoryEncoding(5, output_mode="one_hot"), "int32", columns=1), MASKED),
    ("top_k", lambda: around(lambda ids: ops.top_k(ids, 2)), IDS),
    ("top_k-int32", lambda: around(lambda ids: ops.top_k(ids, 2), "int32"), IDS),
    ("sort", lambda: around(ops.sort), IDS),
    ("sort-int32", lambda: around(ops.sort, "int32"), IDS),
    ("right_shift", lambda: around(lambda ids: ops.right_shift(ids, 2)), IDS),
    ("left_shift", lambda: around(lambda ids: ops.left_shift(ids, 2)), IDS),
    ("argsort", lambda: around(ops.argsort, "int32"), IDS),
    ("rounded-by-a-cast", lambda: around(lambda ids: ops.cast(ops.cast(ids, "float32"), "int32")), IDS),
    ("sum-of-bytes", lambda: around(lambda ids: ops.sum(ids, axis=-1), "uint8"), [[1, 255, 255], [0, 7, 128]]),
    ("product", lambda: around(lambda ids: ops.prod(ids, axis=-1)), IDS),
    ("product-that-wraps", lambda: around(lambda ids: ops.prod(ids, axis=1, keepdims=True), "int32"), IDS),
    ("masked-lookup", lambda: looked_up(1), MASKED),
    ("masked-lookup-of-columns", lambda: looked_up(3), [[0, 1, 9], [5, 0, 0]]),
]


@pytest.mark.parametrize(("build", "rows"), [case[1:] for case in EXACT], ids=[case[0] for case in EXACT])
def test_integers_stay_exact(build: Callable[[], Model], rows: list[list[int]], tmp_path: Path) -> None:
    model = build()
    conversion = convert(model, tmp_path / "model.onnx")
    ids = np.array(rows, model.inputs[0].dtype)
    expected = [np.asarray(answer) for answer in keras.tree.flatten(model(ids))]
    answers = onnxruntime.InferenceSession(tmp_path / "model.onnx").run(None, {"ids": ids})
    for spec, theirs, ours in zip(conversion.signature.outputs, expected, answers, strict=True):
        np.testing.assert_array_equal(ours, theirs, err_msg=spec.name)


def test_mask_token_of_texts(tmp_path: Path) -> None:
    text = keras.Input((1,), dtype="string", name="text")
    lookup = layers.StringLookup(vocabulary=["red", "green"], mask_token="<m>", output_mode="one_hot")
    convert(keras.Model(text, lookup(text)), tmp_path / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (answer,) = session.run(None, {"text": np.array([["<m>"], ["red"], ["blue"]], dtype=object)})
    assert answer.tolist() == [[0, 0, 0], [0, 1, 0], [1, 0, 0]]


def hard_integers(model: Model) -> Batch | None:
    with_answers = probe(open_source(model, None), None).batches
    return next((batch for batch in with_answers if batch.rows == "integers"), None)


def distinct(array: NDArray[Any]) -> set[int]:
    return set(array.ravel().tolist())


def test_the_gate_draws_integers_of_any_size_where_the_model_takes_them() -> None:
    batch = hard_integers(around(ops.abs, "int32"))
    assert batch is not None
    assert distinct(batch.inputs["ids"]) == {-1, 7, -100, 1000, 2**24 + 1, -(2**24) - 3}
    assert not any(slack.any() for slack in batch.slack.values())
    bytes_alone = hard_integers(around(ops.abs, "uint8"))
    assert bytes_alone is not None
    assert distinct(bytes_alone.inputs["ids"]) == {0, 7, 255}


def test_each_input_is_asked_what_it_takes_itself() -> None:
    words, number = keras.Input((3,), dtype="int32", name="words"), keras.Input((3,), dtype="int32", name="number")
    embedded = layers.Embedding(50, 4)(words)
    batch = hard_integers(keras.Model([words, number], [embedded, ops.abs(number)]))
    assert batch is not None
    assert distinct(batch.inputs["words"]) <= set(range(50))
    assert 2**24 + 1 in distinct(batch.inputs["number"])
    examination = probe(open_source(keras.Model(words, embedded), None), None)
    (skipped,) = [kind for kind in examination.skipped if kind.rows == "integers"]
    assert "is not in [0, 50)" in skipped.reason


def test_large_integers_in_floating_point_have_slack(tmp_path: Path) -> None:
    model = around(lambda ids: layers.Dense(4, activation="relu")(ops.cast(ids, "float32")))
    batch = hard_integers(model)
    assert batch is not None
    assert next(iter(batch.slack.values())).max() > 0
    convert(model, tmp_path / "model.onnx")
