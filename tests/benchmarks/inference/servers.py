"""The servers that are measured, each a process group of its own that ends with its `with`."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
from tests.benchmarks.harness import CACHE, ROOT, BenchError, step
from tests.benchmarks.inference.models import Model
from tests.benchmarks.inference.tools import BIN, mlserver
from tests.benchmarks.inference.wire import SERVICE, call

from penstock.oip import inference_pb2

START_LIMIT_S = 120
PENSTOCK = BIN / "penstock"


@dataclass(frozen=True)
class Server:
    """A server that is ready. `started_s` is how long that took from the start of its process."""

    name: str
    address: str
    pid: int
    started_s: float

    def rss_mib(self) -> float:
        """Resident memory of the whole process tree; pages that two processes share count twice."""
        return sum(_status_kib(pid, "VmRSS") for pid in _tree(self.pid)) / 1024


def _tree(root: int) -> list[int]:
    """A process and all that descend from it."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        # A process may end while we look.
        with contextlib.suppress(OSError):
            parent = int(stat.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(stat.parent.name))
    found = [root]
    for pid in found:
        found.extend(children.get(pid, ()))
    return found


def _status_kib(pid: int, field: str) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(field + ":"):
                return int(line.split()[1])
    return 0


@dataclass(frozen=True)
class Process:
    """A started process, and where what it says is kept."""

    name: str
    popen: "subprocess.Popen[bytes]"
    log: Path
    started: float

    def wait_until(self, happened: Callable[[], bool]) -> None:
        """Polls closely until it has happened; raises `BenchError` if the process ends or takes too long."""
        limit = time.monotonic() + START_LIMIT_S
        while not happened():
            if self.popen.poll() is not None:
                raise self._error(f"ended with exit code {self.popen.returncode} before it was ready")
            if time.monotonic() > limit:
                raise self._error(f"was not ready within {START_LIMIT_S} s")
            time.sleep(0.005)

    def ready(self, address: str) -> Server:
        return Server(self.name, address, self.popen.pid, time.monotonic() - self.started)

    def _error(self, what: str) -> BenchError:
        said = self.log.read_text(encoding="utf-8", errors="replace")[-1500:]
        return BenchError(f"{self.name} {what}. {self.log} ends with:\n{said}")


@contextlib.contextmanager
def _process(name: str, command: list[str], cwd: Path = ROOT, **environment: str) -> Iterator[Process]:
    """A process in a group of its own; what it says goes to a file."""
    log = CACHE / "logs" / f"{name.replace(' ', '-').replace(',', '')}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    step(f"starting {name}")
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=cwd,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            yield Process(name, process, log, started)
        finally:
            _stop(process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(10)
    # Also what it left behind.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _ready(address: str, model: Model | None) -> bool:
    if model is None:
        method, content = "ServerReady", b""
    else:
        method, content = "ModelReady", inference_pb2.ModelReadyRequest(name=model.name).SerializeToString()
    try:
        answer = call(address, f"/{SERVICE}/{method}", content, timeout_s=10)
    except grpc.RpcError as error:
        # Some servers say NOT_FOUND of a model that is still to be loaded.
        if error.code() in {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.NOT_FOUND, grpc.StatusCode.DEADLINE_EXCEEDED}:
            return False
        raise BenchError(f"{method} failed with {error.code().name}: {error.details()}") from error
    # ServerReadyResponse and ModelReadyResponse are the same on the wire.
    return inference_pb2.ModelReadyResponse.FromString(answer).ready


@contextlib.contextmanager
def penstock(name: str, model: Model | None, *flags: str) -> Iterator[Server]:
    """Penstock's inference service with one model, or none; its settings are the defaults and the flags given."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        ready, empty = Path(folder) / "ready", Path(folder) / "repository"
        empty.mkdir()
        command = [str(PENSTOCK), "serve", "inference", "--repository", str(model.repository if model else empty)]
        command += ["--port", "0", "--ready-file", str(ready), "--metrics-port", "0", "--log-level", "warning", *flags]
        with _process(name, command, PENSTOCK_HOME=folder) as process:
            process.wait_until(ready.exists)
            address = ready.read_text(encoding="utf-8")
            process.wait_until(lambda: _ready(address, model))
            yield process.ready(address)


@contextlib.contextmanager
def echo() -> Iterator[Server]:
    """grpc.aio that answers every call with the bytes it got."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        ready = Path(folder) / "ready"
        command = [sys.executable, "-m", "tests.benchmarks.inference.echo_server", str(ready)]
        with _process("grpc.aio echo", command) as process:
            process.wait_until(ready.exists)
            yield process.ready(ready.read_text(encoding="utf-8"))


@contextlib.contextmanager
def mlserver_with(model: Model) -> Iterator[Server]:
    """MLServer with a custom ONNX Runtime runtime, no access log, and inference in the process that serves.

    Its default is a worker process behind a queue: one hop more, and with today's uvloop such a worker does not start.
    Its batching is left off: the runs of these models are a few per cent of what a request costs it.
    """
    ports = _free_ports(3)
    settings = {"host": "127.0.0.1", "debug": False, "parallel_workers": 0} | dict(
        zip(("http_port", "grpc_port", "metrics_port"), ports, strict=True)
    )
    model_settings = {
        "name": model.name,
        "implementation": "mlserver_runtime.OnnxRuntime",
        "parameters": {"uri": str(model.path)},
    }
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        (Path(folder) / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        (Path(folder) / "model-settings.json").write_text(json.dumps(model_settings), encoding="utf-8")
        address = f"127.0.0.1:{ports[1]}"
        here = str(Path(__file__).resolve().parent)
        with _process("MLServer", [str(mlserver()), "start", folder], Path(folder), PYTHONPATH=here) as process:
            process.wait_until(lambda: _listens(ports[1]))
            process.wait_until(lambda: _ready(address, model))
            yield process.ready(address)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [held.getsockname()[1] for held in sockets]


def _listens(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True
