"""What people install: the wheel's contents, and what works with the base install alone."""

import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from penstock.client import Addresses, Client

ROOT = Path(__file__).parents[2]
UV = Path(sys.executable).parent / "uv"
SOURCE_ROOTS = ("protos/gen/python", "services", "converters", "clients/python")


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, check=True, capture_output=True, text=True, **options)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    run(UV, "build", "--quiet", "--wheel", "--no-build-isolation", "--out-dir", folder, ROOT)
    [built] = folder.glob("*.whl")
    return built


def test_the_wheel_holds_every_source_file_and_nothing_else(wheel: Path):
    expected = {
        str(path.relative_to(ROOT / root))
        for root in SOURCE_ROOTS
        for path in (ROOT / root / "penstock").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    found = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == expected


def test_the_roots_make_one_namespace_and_every_package_is_typed():
    for root in SOURCE_ROOTS:
        assert not (ROOT / root / "penstock" / "__init__.py").exists()
        for package in (ROOT / root / "penstock").iterdir():
            if package.is_dir() and package.name not in {"__pycache__", "api"}:
                assert (package / "py.typed").exists(), package


def installed(wheel: Path, folder: Path, extra: str = "") -> Path:
    """An environment with the wheel alone, and its python."""
    python = folder / "venv" / "bin" / "python"
    run(UV, "venv", "--quiet", "--python", sys.executable, folder / "venv")
    run(
        UV,
        "pip",
        "install",
        "--quiet",
        "--python",
        python,
        "--constraint",
        ROOT / "requirements.lock",
        f"{wheel}{extra}",
    )
    return python


def test_the_inference_service_runs_without_training_and_its_libraries(wheel: Path, tmp_path: Path):
    python = installed(wheel, tmp_path, "[inference]")
    packages = {line.split("==")[0] for line in run(UV, "pip", "freeze", "--python", python).stdout.splitlines()}
    assert "onnxruntime" in packages
    assert not packages & {"tensorflow", "tensorflow-cpu", "keras", "onnx", "tf2onnx", "sqlalchemy", "scikit-learn"}
    ready = tmp_path / "ready"
    command = [python.parent / "penstock", "serve", "inference", "--port", "0", "--ready-file", ready, "--stop-on-eof"]
    with subprocess.Popen([*command, "--home", tmp_path], stdin=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        while not ready.exists():
            assert server.poll() is None
            time.sleep(0.05)
        with Client(Addresses(inference=ready.read_text())) as client:
            assert client.wait(client.asynchronous.inference.is_server_live())
    assert server.returncode == 0


def test_the_base_install_is_the_client(wheel: Path, tmp_path: Path):
    python = installed(wheel, tmp_path)
    check = (
        "import sys, penstock.client, penstock.oip.inference_pb2; print(*sorted(m.split('.')[0] for m in sys.modules))"
    )
    loaded = set(run(python, "-c", check, cwd=tmp_path).stdout.split())
    assert {"grpc", "numpy", "google"} <= loaded
    assert not loaded & {"click", "rich", "pydantic", "sqlalchemy", "onnxruntime", "tensorflow", "keras"}
    command = subprocess.run([python.parent / "penstock"], capture_output=True, text=True, check=False)
    assert command.returncode == 1
    assert "pip install 'penstock[cli]'" in command.stderr
