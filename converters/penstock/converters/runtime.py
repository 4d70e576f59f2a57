"""ONNX Runtime in a process of its own: a graph that ends the process ends that one only, and its log can be heard.

A division by a size that is zero inside a kernel is enough for it, and no graph is known to be free of them.
"""

import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from threading import Timer
from types import TracebackType
from typing import Any, Self

from numpy.typing import NDArray

from penstock.converters.tensor_frames import Head, read_frame, write_frame

CPU = "CPUExecutionProvider"
WARNING = 2
"""ONNX Runtime's severity from which it is listened to."""
ANSWER_SECONDS = 600.0
"""After so long without an answer the process is ended."""

_RECORD = re.compile(rb"\S+ \S+ \[[WEF]:onnxruntime:[^,\]]*, (?P<place>[^\]]*)\] (?P<text>.*)")
_COLOURS = re.compile(rb"\x1b\[[0-9;]*m")


class RuntimeRefusalError(Exception):
    """ONNX Runtime cannot load the graph, or cannot run it on these rows. The text is its own."""


class RuntimeDeathError(Exception):
    """ONNX Runtime ended its process, or was ended because it did not answer in time.

    `rule` is the limit that it exceeded, `cpu-time` or `wall-clock`, if it was one.
    """

    def __init__(self, message: str, rule: str | None) -> None:
        super().__init__(message)
        self.rule = rule


class Runtime:
    """One graph, open in a process. A context manager: the process ends with the block."""

    def __init__(self, path: Path, *, is_optimized: bool = True, provider: str = CPU) -> None:
        """Starts to load the file; `path` must stay until the block ends."""
        self._head: Head = {
            "path": str(path),
            "is_optimized": is_optimized,
            "provider": provider,
            "log_severity": WARNING,
        }
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 closed by `__exit__`
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()
        self._log.close()

    def load(self) -> None:
        """Raises `RuntimeRefusalError` and `RuntimeDeathError`."""
        self._end()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "penstock.converters.runtime_process"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
        )
        self._exchange(self._head, {})

    def answer(self, rows: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Runs the graph. Raises `RuntimeRefusalError` and `RuntimeDeathError`; the next call starts anew."""
        if self._process is None:
            self.load()
        return self._exchange({}, rows)

    def warnings(self) -> list[str]:
        """What ONNX Runtime has warned of so far, each text once."""
        self._log.seek(0)
        records = (_RECORD.match(_COLOURS.sub(b"", line)) for line in self._log)
        return list(dict.fromkeys(record["text"].decode(errors="replace").strip() for record in records if record))

    def _exchange(self, head: Head, rows: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise RuntimeError("no process was started")
        patience = Timer(ANSWER_SECONDS, process.kill)
        patience.daemon = True
        started = time.monotonic()
        patience.start()
        try:
            write_frame(process.stdin, head, rows)
            said, answers = read_frame(process.stdout)
        except (EOFError, BrokenPipeError):
            code = process.wait()
            self._end()
            if time.monotonic() - started >= ANSWER_SECONDS:
                raise RuntimeDeathError(
                    f"{death(code)} after {ANSWER_SECONDS:g} s without an answer", "wall-clock"
                ) from None
            raise RuntimeDeathError(death(code), "cpu-time" if code == -signal.SIGXCPU else None) from None
        finally:
            patience.cancel()
        if "error" in said:
            raise RuntimeRefusalError(said["error"])
        return answers

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def death(code: int) -> str:
    """What is known of the end of a process by its exit code."""
    try:
        return f"its process ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"its process ended with the code {code}"
