"""One worker as a process: how it is started, what it writes, how it ends."""

import asyncio
import contextlib
import json
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from penstock.api.training.v1.job_pb2 import LogLine, LogSeverity
from penstock.api.training.v1.worker_service_pb2 import Lease

MAX_LINE_BYTES = 8 * 1024
MAX_LINES = 2_000
# Lines of one burst are recorded together.
_BURST_BYTES = 64 * 1024

# Of the service's environment a worker sees what programs need to run, and no credentials.
_PASSED = {"PATH", "HOME", "LANG", "LC_ALL", "TZ", "LD_LIBRARY_PATH"}
_PASSED_PREFIXES = ("CUDA_", "NVIDIA_", "OMP_", "PYTHON", "TF_", "XLA_")
_QUIET = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3", "TF_ENABLE_ONEDNN_OPTS": "0"}

Output = Callable[[list[LogLine]], Awaitable[None]]


class WorkerProcess:
    """A running worker."""

    def __init__(self, process: asyncio.subprocess.Process, pumps: list[asyncio.Task[None]]) -> None:
        self._process = process
        self._pumps = pumps

    async def wait(self) -> str:
        """Waits for its end and tells how it ended, for people."""
        code = await self._process.wait()
        await asyncio.gather(*self._pumps)
        return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with code {code}"

    def kill(self) -> None:
        """Ends it, and whatever it has started."""
        # It may have ended by itself without asyncio having noticed yet.
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)


@asynccontextmanager
async def worker_process(
    address: str, lease: Lease, checkpoint_interval_s: float, folder: Path, output: Output
) -> AsyncIterator[WorkerProcess]:
    """Starts a worker in a folder of its own and hands it its orders through a pipe; kills it if it outlives the block.

    The pipe stays open for as long as this process lives: its end tells the worker that nobody waits for it any more.
    """
    folder.mkdir(mode=0o700, parents=True)
    command = (sys.executable, "-P", "-u", "-m", "penstock.training.worker")
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
        env=_environment(folder),
        # A Ctrl-C in the terminal is for the service, which then ends its workers.
        start_new_session=True,
    )
    streams = ((process.stdout, LogSeverity.LOG_SEVERITY_INFO), (process.stderr, LogSeverity.LOG_SEVERITY_WARNING))
    pumps = [asyncio.create_task(_pump(stream, severity, output)) for stream, severity in streams if stream]
    worker = WorkerProcess(process, pumps)
    try:
        orders = {
            "address": address,
            "job_id": lease.job_id,
            "fencing_token": lease.fencing_token,
            "secret": lease.secret,
            "checkpoint_interval_s": checkpoint_interval_s,
        }
        if process.stdin is not None:
            process.stdin.write(json.dumps(orders).encode() + b"\n")
        yield worker
    finally:
        worker.kill()
        await worker.wait()
        await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)


async def _pump(stream: asyncio.StreamReader, severity: "LogSeverity.ValueType", output: Output) -> None:
    """Passes a stream's lines on until it ends: long ones cut, and no more than `MAX_LINES`."""
    left = MAX_LINES
    rest = b""
    while chunk := await stream.read(_BURST_BYTES):
        *lines, rest = (rest + chunk).split(b"\n")
        if len(rest) > MAX_LINE_BYTES:
            lines, rest = [*lines, rest], b""
        left = await _pass_on(lines, left, severity, output)
    if rest:
        await _pass_on([rest], left, severity, output)


async def _pass_on(lines: list[bytes], left: int, severity: "LogSeverity.ValueType", output: Output) -> int:
    """Passes lines on while some are left to be passed, and tells how many are left then."""
    texts = [line[:MAX_LINE_BYTES].decode(errors="replace").rstrip() for line in lines]
    texts = [text for text in texts if text]
    shown = texts[:left]
    if len(texts) > len(shown) and left > 0:
        shown.append(f"The worker wrote more than {MAX_LINES:,} lines; the others are dropped.")
    if shown:
        await output([log_line(text, severity) for text in shown])
    return left - len(texts)


def log_line(text: str, severity: "LogSeverity.ValueType") -> LogLine:
    """A line of a log, cut to what the contract allows."""
    return LogLine(severity=severity, text=text.encode()[:MAX_LINE_BYTES].decode(errors="ignore"))


def _environment(folder: Path) -> dict[str, str]:
    passed = {name: value for name, value in os.environ.items() if name in _PASSED or name.startswith(_PASSED_PREFIXES)}
    return {**passed, **_QUIET, "TMPDIR": str(folder)}
