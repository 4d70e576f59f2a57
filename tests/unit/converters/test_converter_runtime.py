"""Tensors between two processes, and a process that a graph may end."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import parser

from penstock.converters import runtime as runtime_module
from penstock.converters.runtime import Runtime, RuntimeDeathError, RuntimeRefusalError
from penstock.converters.tensor_frames import read_frame, write_frame

DTYPES = st.sampled_from([np.dtype(name) for name in ("bool", "uint8", "int64", "float16", "float32", "float64")])
SHAPES = arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4)


@given(st.dictionaries(st.text(), arrays.arrays(DTYPES, SHAPES), max_size=3))
def test_tensors_come_as_they_were_sent(tensors: dict[str, Any]) -> None:
    stream = io.BytesIO()
    write_frame(stream, {"n": 1}, tensors)
    stream.seek(0)
    head, came = read_frame(stream)
    assert head == {"n": 1}
    assert list(came) == list(tensors)
    for name, array in tensors.items():
        assert (came[name].dtype, came[name].shape, came[name].tobytes()) == (array.dtype, array.shape, array.tobytes())


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
def test_texts_come_as_they_were_sent(texts: list[str]) -> None:
    stream = io.BytesIO()
    write_frame(stream, {}, {"x": np.array(texts, object).reshape(-1, 1)})
    stream.seek(0)
    _, came = read_frame(stream)
    assert came["x"].shape == (len(texts), 1)
    assert came["x"].ravel().tolist() == texts


def test_half_a_frame_is_an_end() -> None:
    stream = io.BytesIO()
    write_frame(stream, {}, {"x": np.ones(3)})
    with pytest.raises(EOFError):
        read_frame(io.BytesIO(stream.getvalue()[:-1]))


LSTM = """<ir_version: 10, opset_import: ["": 18]>
g (float[steps, batch, 1] x) => (float[steps, 1, batch, 1] y)
  <float[1, 4, 1] w = {1.0, 1.0, 1.0, 1.0}, float[1, 4, 1] r = {1.0, 1.0, 1.0, 1.0}> {
    y = LSTM <hidden_size = 1> (x, w, r)
}"""
LOOP = """<ir_version: 10, opset_import: ["": 18]>
g (int64 n) => (int64 y) <bool go = {1}, int64 zero = {0}> {
    y = Loop (n, go, zero) <body = b (int64 i, bool c, int64 before) => (bool c2, int64 after) {
        c2 = Identity (c)
        after = Add (before, i)
    }>
}"""


def saved(text: str, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(parser.parse_model(text), path)
    return path


def test_a_graph_that_ends_its_process_is_told_and_the_next_rows_are_answered(tmp_path: Path) -> None:
    with Runtime(saved(LSTM, tmp_path)) as runtime:
        runtime.load()
        with pytest.raises(RuntimeDeathError, match="its process ended by SIG"):
            runtime.answer({"x": np.zeros((3, 0, 1), np.float32)})
        assert runtime.answer({"x": np.ones((3, 2, 1), np.float32)})["y"].shape == (3, 1, 2, 1)
        with pytest.raises(RuntimeRefusalError, match="Got invalid dimensions"):
            runtime.answer({"x": np.ones((3, 2, 2), np.float32)})


def test_a_graph_that_does_not_come_to_an_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime_module, "ANSWER_SECONDS", 2.0)
    with Runtime(saved(LOOP, tmp_path)) as runtime:
        assert runtime.answer({"n": np.int64(3)})["y"] == 3
        with pytest.raises(RuntimeDeathError, match="SIGKILL"):
            runtime.answer({"n": np.int64(2**62)})


def test_what_is_no_graph_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"not a model")
    with Runtime(path) as runtime, pytest.raises(RuntimeRefusalError, match=r"model\.onnx"):
        runtime.load()
