"""A model made elsewhere: imported, deployed, asked, and still served after everything was stopped or killed."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import onnx
import pytest
from tests.e2e.conftest import Up, wait_for

from penstock.client import Client


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A line, y = 2x + 1, on rows of three numbers."""
    path = tmp_path_factory.mktemp("graph") / "line.onnx"
    text = """<ir_version: 10, opset_import: ["" : 20]>
        line (float[batch, 3] x) => (float[batch, 3] y) <float two = {2.0}, float one = {1.0}> {
            doubled = Mul(x, two)
            y = Add(doubled, one)
        }"""
    onnx.save(onnx.parser.parse_model(text), path)
    return path


def test_from_a_file_to_answers_with_the_command_alone(up: Up, graph: Path):
    version = up.json("models", "import", "line", graph, "--alias", "champion")
    assert version["number"] == "1"
    assert [tensor["name"] for tensor in version["signature"]["inputs"]] == ["x"]

    assert "ready" in up.run("deploy", "set", "line").stdout
    answer = up.json("infer", "line", "[[1, 2, 3], [0, 0, 0.5]]")
    assert answer["outputs"]["y"] == [[3.0, 5.0, 7.0], [1.0, 1.0, 2.0]]
    assert answer["version"] == "1"
    assert up.json("infer", "line", "[1, 2, 3]")["outputs"]["y"] == [[3.0, 5.0, 7.0]], "a missing batch axis is added"

    [served] = up.json("deploy", "status")
    assert (served["model"], served["version"], served["state"]) == ("line", "1", "SERVING_STATE_READY")
    assert "line" in up.run("models", "list").stdout
    assert "champion" in up.run("models", "versions", "line").stdout
    assert "x FP32 [batch, 3]" in up.run("models", "get", "line").stdout
    assert "import of line.onnx" in up.run("models", "history", "line", "champion").stdout


def test_a_second_version_shares_the_traffic(up: Up, graph: Path):
    up.run("models", "import", "line", graph)
    up.run("deploy", "set", "line", "1=50", "2=50")
    with Client(up.addresses) as client:
        row = np.ones((1, 3), np.float32)
        versions = {client.inference.infer("line", {"x": row}).version for _ in range(60)}
    assert versions == {"1", "2"}
    up.run("deploy", "set", "line", "champion")


def test_what_was_downloaded_is_what_was_imported(up: Up, graph: Path, tmp_path: Path):
    up.run("models", "download", "line", tmp_path / "bundle", "--alias", "champion")
    assert (tmp_path / "bundle" / "model.onnx").read_bytes() == graph.read_bytes()
    assert "manifest.json" in {path.name for path in (tmp_path / "bundle").iterdir()}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("infer", "nobody", "[1]"), "unknown model"),
        (("infer", "line", "[[1, 2]]"), "line"),
        (("infer", "line", "x=[[1, 2, 3]]", "x=[[1, 2, 3]]"), "given twice"),
        (("infer", "line", '[[1, 2, "three"]]'), "no FP32 tensor"),
        (("models", "get", "nobody"), "There is no model 'nobody'"),
        (("models", "alias", "line", "champion", "99"), "99"),
        (("models", "delete", "line"), "deploy"),
        (("deploy", "set", "line", "champion=70"), "100"),
        (("deploy", "set", "line", "challenger"), "challenger"),
        (("datasets", "get", "Nobody!"), "name: expected 1 to 63"),
        (("jobs", "list", "--state", "lost"), "expected one of"),
    ],
)
def test_a_mistake_is_explained_and_nothing_else(up: Up, arguments: tuple[str, ...], message: str):
    result = up.run(*arguments, check=False)
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_without_services_the_command_says_how_to_start_them(up: Up, tmp_path: Path):
    nowhere = Up(tmp_path)
    result = nowhere.run("models", "list", check=False)
    assert result.returncode == 1
    assert "penstock up" in result.stderr


def test_a_second_up_on_the_same_home_is_refused(up: Up):
    second = Up(up.home)
    with pytest.raises(AssertionError, match=r"in use by process \d+"):
        second.start()


def test_a_second_up_on_the_same_port_is_refused(up: Up, tmp_path: Path):
    second = Up(tmp_path, up.ports)
    with pytest.raises(AssertionError, match="Cannot listen on"):
        second.start()


def test_after_ctrl_c_and_up_again_the_same_models_are_served(up: Up):
    assert up.stop() == 0
    up.start()
    with Client(up.addresses) as client:
        wait_for(lambda: client.inference.is_model_ready("line"))
    assert up.json("infer", "line", "[[1, 2, 3]]")["outputs"]["y"] == [[3.0, 5.0, 7.0]]


def test_when_up_is_killed_its_services_stop_and_lose_nothing(up: Up):
    assert up.process is not None
    os.kill(up.process.pid, signal.SIGKILL)
    up.process.communicate(timeout=60)
    wait_for(lambda: not any(_held(up.home / service / "lock") for service in ("registry", "training", "inference")))
    up.start()
    with Client(up.addresses) as client:
        wait_for(lambda: client.inference.is_model_ready("line"))
    versions = json.loads(up.run("models", "versions", "line", "--json").stdout)
    assert [version["number"] for version in versions] == ["2", "1"]


def _held(lock: Path) -> bool:
    import fcntl

    with lock.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
