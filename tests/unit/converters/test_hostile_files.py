"""Files that want more than a file may. test_keras_archive and test_onnx_conversion have those refused before that."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import parser

from penstock.converters import (
    ConversionError,
    GateError,
    InvalidSamplesError,
    Limits,
    Tolerance,
    UnsafeFileError,
    convert,
    inspect,
    verify,
)

ENDLESS = """<ir_version: 10, opset_import: ["": 18]>
g (float[N, 1] x) => (float[N, 1] y) <bool go = {1}, int64 many = {4611686018427387904}> {
    y = Loop (many, go, x) <body = b (int64 i, bool c, float[N, 1] before) => (bool c2, float[N, 1] after) {
        c2 = Identity (c)
        after = Identity (before)
    }>
}"""
ENORMOUS = """<ir_version: 10, opset_import: ["": 18]>
g (float[N, 1] x) => (float[N, 1] y) <int64[2] shape = {1, 9000000000}, int64[1] axis = {1}> {
    many = Expand (x, shape)
    y = ReduceMax <keepdims = 1> (many, axis)
}"""
DOUBLED = """<ir_version: 10, opset_import: ["": 18]>
g (float[N, 2] x) => (float[N, 2] y) { y = Add (x, x) }"""
WORDS = """<ir_version: 10, opset_import: ["": 18]>
g (string[N, 1] x) => (string[N, 1] y) { y = Identity (x) }"""


def graph(text: str, folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save(parser.parse_model(text), path)
    return path


def gigantic_keras(folder: Path) -> Path:
    """Four terabytes of weights by a configuration of a kilobyte."""
    dense = {"module": "keras.layers", "class_name": "Dense", "registered_name": None}
    start = {"module": "keras.layers", "class_name": "InputLayer", "config": {"batch_shape": [None, 1_000_000]}}
    layers = [start, dense | {"config": {"units": 1_000_000}, "build_config": {"input_shape": [None, 1_000_000]}}]
    config = {"module": "keras", "class_name": "Sequential", "config": {"name": "s", "layers": layers}}
    path = folder / "model.keras"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("config.json", json.dumps(config))
        archive.writestr("metadata.json", json.dumps({"keras_version": "3.15.1", "date_saved": ""}))
        archive.writestr("model.weights.h5", b"")
    return path


def endless(folder: Path) -> Path:
    return graph(ENDLESS, folder)


def enormous(folder: Path) -> Path:
    return graph(ENORMOUS, folder)


def heavy(folder: Path) -> Path:
    model = parser.parse_model(DOUBLED)
    model.doc_string = "heavy" * 10_000
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where models are; and the folder of temporary files is one that nothing else uses, and empty in the end."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    models = tmp_path / "models"
    models.mkdir()
    yield models
    assert not list(temporary.iterdir())


EXCEEDING: list[tuple[Callable[[Path], Path], Limits, str]] = [
    (gigantic_keras, Limits(), "memory"),
    (enormous, Limits(memory_bytes=2**30), "memory"),
    (endless, Limits(cpu_seconds=2), "cpu-time"),
    (endless, Limits(wall_seconds=2), "wall-clock"),
    (heavy, Limits(file_bytes=20_000), "file-size"),
]


@pytest.mark.parametrize(("build", "limits", "rule"), EXCEEDING, ids=[f"{c[0].__name__}-{c[2]}" for c in EXCEEDING])
def test_a_file_that_exceeds_a_limit(build: Callable[[Path], Path], limits: Limits, rule: str, folder: Path) -> None:
    path = build(folder)
    with pytest.raises(UnsafeFileError, match=rf"{path} needs more than a file may.*\(rule: {rule}\)") as caught:
        convert(path, folder / "out.onnx", limits=limits)
    assert caught.value.rule == rule
    assert list(folder.iterdir()) == [path]


def test_verification_and_inspection_have_the_limits_too(folder: Path) -> None:
    path = endless(folder)
    with pytest.raises(UnsafeFileError, match="rule: wall-clock"):
        verify(parser.parse_model(DOUBLED), path, limits=Limits(wall_seconds=2))
    with pytest.raises(UnsafeFileError, match="rule: wall-clock"):
        inspect(path, limits=Limits(wall_seconds=0.01))


def child(parent: int = os.getpid()) -> int:
    children = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    (found,) = [int(pid) for pid in children if b"sandbox_process" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    return found


def test_what_the_process_has(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("TF_TOKEN_example_com", "secret")
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", "here")
    seen: dict[str, Any] = {}

    def look(step: str) -> None:
        if step != "trace":
            return
        process = Path(f"/proc/{child()}")
        seen["environment"] = dict(
            line.split("=", 1) for line in (process / "environ").read_text().split("\0") if "=" in line
        )
        seen["network"] = (process / "ns/net").readlink()
        seen["folder"] = (process / "cwd").readlink()
        seen["limits"] = {
            line[:26].strip(): line[26:].split()[0] for line in (process / "limits").read_text().splitlines()
        }
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # an endless model waits until everything was seen
        convert(endless(folder), folder / "out.onnx", limits=Limits(memory_bytes=2**31), on_step=look)
    environment = seen["environment"]
    assert environment["PATH"] == os.environ["PATH"]
    assert environment["TF_NUM_INTRAOP_THREADS"] == "1"
    assert environment["PYTHONPATH"] == str(Path.cwd() / "here")
    assert "secret" not in environment.values()
    assert environment["HOME"] == environment["TMPDIR"] == str(seen["folder"]) != os.environ["HOME"]
    assert seen["limits"]["Max data size"] == str(2**31)
    assert seen["limits"]["Max core file size"] == "0"
    assert seen["limits"]["Max cpu time"] == "3600"
    allowed = subprocess.run(["unshare", "--net", "--map-root-user", "true"], check=False, capture_output=True)
    if allowed.returncode == 0:
        assert seen["network"] != Path("/proc/self/ns/net").readlink()


def test_a_process_that_is_ended_by_something_else(folder: Path) -> None:
    path = endless(folder)

    def end(step: str) -> None:
        if step == "trace":
            os.kill(child(), signal.SIGTERM)

    with pytest.raises(ConversionError, match=f"Reading {path} ended the process that did it: .*SIGTERM"):
        convert(path, folder / "out.onnx", on_step=end)
    assert list(folder.iterdir()) == [path]


def test_an_interrupted_conversion_leaves_no_process(folder: Path) -> None:
    pids: list[int] = []

    def interrupt(step: str) -> None:
        pids.append(child())
        if step == "trace":
            time.sleep(1)  # ONNX Runtime's own process has begun
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(endless(folder), folder / "out.onnx", on_step=interrupt)
    assert wait_for_end_of_session(pids[0])


def test_the_process_ends_with_its_parent(folder: Path) -> None:
    program = f"""
import sys
from pathlib import Path
from penstock.converters import convert
def told(step):
    print(step, flush=True)
convert({str(endless(folder))!r}, {str(folder / "out.onnx")!r}, on_step=told)
"""
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env={**os.environ, "TMPDIR": str(folder)}
    ) as parent:
        assert parent.stdout
        assert [parent.stdout.readline().strip() for _ in range(2)] == ["load", "trace"]
        session = child(parent.pid)
        os.kill(session, signal.SIGSTOP)  # as one that does not hear of anything
        parent.kill()
    assert wait_for_end_of_session(session)
    deadline = time.monotonic() + 10
    while len(list(folder.iterdir())) > 1 and time.monotonic() < deadline:
        time.sleep(0.05)
    assert [path.name for path in folder.iterdir()] == ["model.onnx"]


def processes_of_session(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, its_session = stat.read_text().rpartition(")")[2].split()[:4]
        except OSError:
            continue
        if int(its_session) == session and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for_end_of_session(session: int) -> bool:
    deadline = time.monotonic() + 10
    while processes_of_session(session) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not processes_of_session(session)


SAMPLES: list[tuple[str, Any]] = [
    (DOUBLED, np.linspace(-3, 3, 600).reshape(300, 2)),
    (DOUBLED, np.ones((3, 2), ">f4")),
    (DOUBLED, [[1.0, 2.0]]),
    (WORDS, np.array([["a"], ["é"], [""]])),
    (WORDS, np.array([["a"], [b"b"]], object)),
]


@pytest.mark.parametrize(("text", "samples"), SAMPLES, ids=["float64", "other-endian", "lists", "texts", "bytes"])
def test_a_file_converts_like_the_live_model(text: str, samples: Any, folder: Path) -> None:
    path, target = graph(text, folder), folder / "out.onnx"
    steps: list[str] = []
    options: dict[str, Any] = {"samples": {"x": samples}, "tolerance": Tolerance(0, 0), "opset": 20}
    here = convert(onnx.load(path), folder / "here.onnx", **options)
    there = convert(path, target, on_step=steps.append, **options)
    assert there == replace(here, path=target)
    assert target.read_bytes() == (folder / "here.onnx").read_bytes()
    assert steps == ["load", "trace", "convert", "verify", "write"]


@pytest.mark.parametrize(
    ("samples", "error"),
    [
        ({"z": np.ones((1, 2))}, InvalidSamplesError),
        ({"x": np.ones((1, 2), np.dtype([("a", "f4")]))}, InvalidSamplesError),
        ({"x": np.ones((1, 3))}, InvalidSamplesError),
    ],
)
def test_errors_keep_their_class(samples: dict[str, Any], error: type[Exception], folder: Path) -> None:
    path = graph(DOUBLED, folder)
    with pytest.raises(error, match="Samples"):
        convert(path, folder / "out.onnx", samples=samples)
    assert list(folder.iterdir()) == [path]


def test_a_failed_gate_says_the_same_of_a_file(folder: Path) -> None:
    path = graph(DOUBLED, folder)
    other = parser.parse_model(DOUBLED.replace("Add", "Mul"))
    failures = []
    for source in (path, onnx.load(path)):
        with pytest.raises(GateError) as caught:
            verify(other, source)
        failures.append((str(caught.value), caught.value.output, caught.value.row, caught.value.difference))
    assert failures[0] == failures[1]
    assert failures[0][1] == "y"


def test_a_target_that_cannot_be_written(folder: Path) -> None:
    path = graph(DOUBLED, folder)
    target = folder / "out.onnx"
    target.mkdir()
    with pytest.raises(ConversionError, match=f"Cannot write {target}"):
        convert(path, target)
    assert sorted(folder.iterdir()) == [path, target]
