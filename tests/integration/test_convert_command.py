"""`penstock convert`, on files."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from numpy.typing import NDArray

from penstock.cli.convert import convert
from penstock.cli.inspect import inspect
from penstock.converters import read_signature
from penstock.converters.conversion import _quiet_tensorflow

# Keras reads its variables with numpy.array, which NumPy 2 warns of; only saving does so, not converting.
pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning"
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    _quiet_tensorflow()
    import keras

    keras.utils.set_random_seed(7)
    path = tmp_path_factory.mktemp("model") / "model.keras"
    keras.Sequential(
        [keras.Input((8,), name="features"), keras.layers.Dense(3, activation="softmax", name="scores")]
    ).save(path)
    return path


@pytest.fixture(scope="module")
def graph(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model as ONNX, which converts without seconds of TensorFlow."""
    path = tmp_path_factory.mktemp("graph") / "model.onnx"
    result = run(model, path)
    assert result.exit_code == 0, result.output
    return path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(convert, [str(argument) for argument in arguments])


def test_tables(model: Path, tmp_path: Path) -> None:
    result = run(model, tmp_path / "out.onnx")
    assert result.exit_code == 0, result.output
    for part in ("features", "[batch, 8]", "scores", "[batch, 3]", "random", "opset 18"):
        assert part in result.stdout
    assert result.stderr == ""
    assert read_signature(tmp_path / "out.onnx").inputs[0].name == "features"


def test_json_with_samples(graph: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", features=np.ones((5, 8), np.float32))
    target = tmp_path / "out.onnx"
    result = run(graph, target, "--json", "--samples", tmp_path / "rows.npz", "--atol", "1e-3")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["path"] == str(target)
    assert report["signature"]["inputs"] == [{"name": "features", "datatype": "FP32", "shape": ["batch", 8]}]
    assert [(case["rows"], case["batch_size"]) for case in report["parity"]["cases"]][-1] == ("sample", 5)
    assert report["parity"]["absolute_tolerance"] == 1e-3
    assert report["size_bytes"] == target.stat().st_size


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ({"feature": np.ones((5, 8))}, "needed for the inputs ['features']"),
        ({"features": np.asarray([["a", {}]], dtype=object)}, "Cannot read the samples"),
        ({"features": np.full((1, 8), b"\xff")}, "Texts need to be UTF-8"),
        (b"no archive", "Cannot read the samples"),
        (np.ones((5, 8)), "Cannot read the samples"),
    ],
)
def test_bad_samples(
    samples: dict[str, object] | bytes | NDArray[np.float64], message: str, graph: Path, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.npz"
    with rows.open("wb") as file:
        if isinstance(samples, bytes):
            file.write(samples)
        elif isinstance(samples, dict):
            np.savez(file, **samples)
        else:
            np.save(file, samples)
    result = run(graph, tmp_path / "out.onnx", "--samples", rows)
    assert result.exit_code == 1
    assert message in " ".join(result.stderr.split())
    assert not (tmp_path / "out.onnx").exists()


def test_failed_gate(model: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "rows.npz", features=np.random.default_rng(1).standard_normal((500, 8)).astype(np.float32))
    result = run(model, tmp_path / "out.onnx", "--samples", tmp_path / "rows.npz", "--atol", "0", "--rtol", "0")
    assert result.exit_code == 1
    assert "'scores' differs from the source" in result.stderr
    assert "Traceback" not in result.output
    assert not (tmp_path / "out.onnx").exists()


def test_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "model.keras").write_bytes(b"no archive")
    result = run(tmp_path / "model.keras", tmp_path / "out.onnx")
    assert result.exit_code == 1
    assert "is not a .keras archive" in result.stderr


def test_onnx_with_report_and_opset(graph: Path, tmp_path: Path) -> None:
    result = run(graph, "-o", tmp_path / "out.onnx", "--opset", "20", "--report", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert "opset 20" in result.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tolerances"] == [{"datatype": "FP32", "absolute": 1e-5, "relative": 1e-4}]
    assert {"rows": "nan", "reason": "the source answers with no number"} in report["skipped"]


def test_limits(graph: Path, tmp_path: Path) -> None:
    result = run(graph, "-o", tmp_path / "out.onnx", "--max-seconds", "0.1")
    assert result.exit_code == 1
    assert "needs more than a file may: 0.1 s in all" in " ".join(result.stderr.split())
    assert "rule: wall-clock" in result.stderr
    result = run(graph, "-o", tmp_path / "out.onnx", "--max-memory", "0.05")
    assert result.exit_code == 1
    assert "rule: memory" in result.stderr
    assert not list(tmp_path.iterdir())


def test_one_target_that_is_not_the_source(model: Path, tmp_path: Path) -> None:
    assert "Give one file" in run(model, tmp_path / "a.onnx", "-o", tmp_path / "b.onnx").stderr
    assert "would replace the model itself" in run(model, model).stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--tolerance", "nan"),
        ("--atol", "inf"),
        ("--max-seconds", "inf"),
        ("--max-memory", "nan"),
        ("--agreement", "nan"),
    ],
)
def test_numbers_are_finite(option: str, value: str, graph: Path, tmp_path: Path) -> None:
    result = run(graph, tmp_path / "out.onnx", option, value)
    assert result.exit_code == 2
    assert "is not a finite number" in result.stderr


def test_a_report_replaces_nothing_of_the_conversion(graph: Path, tmp_path: Path) -> None:
    before, target = graph.read_bytes(), tmp_path / "out.onnx"
    for report in (graph, target):
        result = run(graph, target, "--report", report)
        assert result.exit_code == 2
        assert "The report would replace" in result.stderr
    assert "does not exist" in run(graph, target, "--report", tmp_path / "none" / "report.json").stderr
    assert graph.read_bytes() == before
    assert not list(tmp_path.iterdir())


def test_only_files_are_read_and_replaced(graph: Path, tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.onnx"
    os.mkfifo(pipe)
    assert "is not a file" in run(graph, pipe).stderr
    assert "Cannot read" in run(pipe, tmp_path / "out.onnx").stderr
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_inspect(graph: Path) -> None:
    tables = CliRunner().invoke(inspect, [str(graph)])
    assert tables.exit_code == 0, tables.output
    for part in ("features", "[batch, 8]", "MatMul", "ai.onnx 18", "CPUExecutionProvider", "can run it"):
        assert part in tables.stdout
    found = json.loads(CliRunner().invoke(inspect, [str(graph), "--json"]).stdout)
    assert found["parameter_count"] == 24  # a bias of zeros is optimized away
    assert found["operators"]["MatMul"] == 1


def test_parquet_samples(graph: Path, tmp_path: Path) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    rows = np.random.default_rng(1).standard_normal((5, 8)).tolist()
    parquet.write_table(pa.table({"features": rows}), tmp_path / "rows.parquet")
    result = run(graph, tmp_path / "out.onnx", "--json", "--samples", tmp_path / "rows.parquet", "--tolerance", "1e-3")
    assert result.exit_code == 0, result.output
    parity = json.loads(result.stdout)["parity"]
    assert ("sample", 5) in [(case["rows"], case["batch_size"]) for case in parity["cases"]]
    assert parity["tolerances"] == [{"datatype": "FP32", "absolute": 1e-3, "relative": 1e-3}]
    (tmp_path / "rows.parquet").write_bytes(b"no table")
    assert "Cannot read the samples" in run(graph, tmp_path / "b.onnx", "--samples", tmp_path / "rows.parquet").stderr


def test_variants(graph: Path, tmp_path: Path) -> None:
    target = tmp_path / "out.onnx"
    result = run(
        graph,
        target,
        "--variants",
        "int4, pruned,int8-static",
        "--auto",
        "--agreement",
        "0",
        "--report",
        tmp_path / "r.json",
    )
    assert result.exit_code == 0, result.output
    for part in ("Variants, on 42 rows", "fp32", "int4", "pruned", "32 rows", "chosen"):
        assert part in result.stdout
    table = json.loads((tmp_path / "r.json").read_text())["variants"]
    assert [variant["name"] for variant in table["variants"]] == ["fp32", "int4", "pruned", "int8-static"]
    assert "give some hundred typical rows" in table["variants"][3]["dropped"].lower()
    assert table["min_argmax_agreement"] == 0.0
    assert table["max_relative_error"] == 0.05
    written = {path.name for path in tmp_path.iterdir()} - {"r.json", "out.onnx"}
    kept = {variant["name"] for variant in table["variants"] if not variant["dropped"]} - {table["chosen"]}
    assert written == {f"out.{name}.onnx" for name in kept}
    assert "There is no variant 'int3'" in run(graph, target, "--variants", "int3").stderr
