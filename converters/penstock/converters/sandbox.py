"""Files of unknown origin are read in a process of their own, with limits, no network and none of our secrets.

The process is new, not forked; it gets a question and gives an answer, both JSON. It may write into a temporary folder,
which goes with it: what it has made is put in its place by `foreign_files`.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Timer
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from penstock.converters.codec import decode_error, encode
from penstock.converters.errors import ConversionError, InvalidSamplesError, UnsafeFileError
from penstock.converters.limits import OUT_OF_MEMORY, Limits
from penstock.converters.runtime import ANSWER_SECONDS, death
from penstock.converters.source import as_text
from penstock.converters.tensor_frames import read_frame, write_frame

MAX_ANSWER_BYTES = 64 * 2**20
_LOG_TAIL_BYTES = 2**16
# Nothing is ever sent, so `read` waits for our end. What is killed takes a moment to stop writing.
_GUARD = 'read -r nothing; kill -s KILL -- "-$0" 2>/dev/null; sleep 1; rm -rf -- "$1"'

# By name, not by how they begin: TF_ is also how the secrets of another program, Terraform, begin.
_ENVIRONMENT = (
    *("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ"),
    *("PYTHONHOME", "PYTHONPATH", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE"),
    *("TF_CPP_MIN_LOG_LEVEL", "TF_ENABLE_ONEDNN_OPTS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"),
    *("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "CUDA_VISIBLE_DEVICES"),
)


def ask(
    task: str,
    file: Path,
    arguments: Mapping[str, Any],
    folder: Path,
    *,
    samples: Mapping[str, NDArray[Any]] | None = None,
    on_step: Callable[[Any], None] | None = None,
    limits: Limits | None = None,
) -> Any:  # noqa: ANN401 JSON
    """Has a task of `sandbox_process` done about `file`.

    The process may write into `folder`. Raises what the task raises, `UnsafeFileError` with the limit's rule if it
    exceeded one, and `ConversionError` if it ended in another way. The process ends with this call, however that ends;
    if our own process is killed, `folder` is deleted too.
    """
    if file.exists() and not file.is_file():
        raise ConversionError(f"Cannot read {file}: it is no file but a folder, a device or a pipe. Name a file.")
    limits = limits or Limits()
    head = {
        "task": task,
        "arguments": encode(arguments),
        "has_samples": samples is not None,
        "has_steps": on_step is not None,
    }
    rows = {name: _carried(name, np.asarray(array)) for name, array in (samples or {}).items()}
    started = time.monotonic()
    with tempfile.TemporaryFile() as log:
        process = _started(limits, folder, log)
        guard = _guard(process.pid, folder)
        patience = Timer(limits.wall_seconds, _end, [process])
        patience.daemon = True
        patience.start()
        try:
            return _answer(process, head, rows, on_step, file, limits)
        except (EOFError, BrokenPipeError):
            code = process.wait()
            is_late = time.monotonic() - started >= limits.wall_seconds
            raise _ended(file, code, log, limits, is_late=is_late) from None
        finally:
            patience.cancel()
            _end(process)
            process.communicate()
            guard.kill()
            guard.communicate()


def _started(limits: Limits, folder: Path, log: IO[bytes]) -> subprocess.Popen[bytes]:
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    if search := environment.get("PYTHONPATH"):
        environment["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, search.split(os.pathsep)))
    return subprocess.Popen(  # noqa: S603 our own module and numbers
        # The limits are an argument because they hold before the first frame is read.
        [sys.executable, "-P", "-m", "penstock.converters.sandbox_process", json.dumps(encode(limits))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        cwd=folder,
        env=environment | {"HOME": str(folder), "TMPDIR": str(folder), "KERAS_BACKEND": "tensorflow"},
        # Its own processes are of the same session, and so end with it.
        start_new_session=True,
    )


def _guard(session: int, folder: Path) -> subprocess.Popen[bytes]:
    """Outlives us if we are killed. The process itself cannot see to it: a library at fault may not let it run."""
    return subprocess.Popen(  # noqa: S603 our own script, a number and the folder that we made
        ["/bin/sh", "-c", _GUARD, str(session), str(folder)], stdin=subprocess.PIPE, start_new_session=True
    )


def _answer(
    process: subprocess.Popen[bytes],
    head: dict[str, Any],
    rows: Mapping[str, NDArray[Any]],
    on_step: Callable[[Any], None] | None,
    file: Path,
    limits: Limits,
) -> Any:  # noqa: ANN401 JSON
    if process.stdin is None or process.stdout is None:
        raise RuntimeError("the process was started without pipes")
    write_frame(process.stdin, head, rows)
    while True:
        said, _ = read_frame(process.stdout, max_bytes=MAX_ANSWER_BYTES)
        if "step" in said and on_step:
            on_step(said["step"])
        elif "exceeded" in said:
            raise _exceeded(file, said["exceeded"], limits)
        elif "error" in said:
            raise decode_error(said["error"])
        else:
            return said["answer"]


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _carried(name: str, array: NDArray[Any]) -> NDArray[Any]:
    """As frames have them: texts as objects, numbers in this machine's order of bytes."""
    if array.dtype.kind == "V":
        raise InvalidSamplesError(f"Samples of the input {name!r} need numbers or texts; got {array.dtype}.")
    if array.dtype.kind in "OSU":
        return as_text(array)
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def _ended(file: Path, code: int, log: IO[bytes], limits: Limits, *, is_late: bool) -> ConversionError:
    """What is known of a process that ended without an answer."""
    log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
    said = log.read()
    if is_late:
        return _exceeded(file, "wall-clock", limits)
    if code == -signal.SIGXCPU:
        return _exceeded(file, "cpu-time", limits)
    if OUT_OF_MEMORY.search(said):
        return _exceeded(file, "memory", limits)
    last = said.decode(errors="replace").strip().rpartition("\n")[2]
    return ConversionError(
        f"Reading {file} ended the process that did it: {death(code)}. Nothing was written. Its last words: {last!r}."
    )


def _exceeded(file: Path, rule: str, limits: Limits) -> UnsafeFileError:
    uses = {
        "memory": f"{limits.memory_bytes / 2**30:.1f} GiB of memory",
        "cpu-time": f"{limits.cpu_seconds} s of processor time",
        "file-size": f"{limits.file_bytes / 2**30:.1f} GiB in one file",
        "wall-clock": f"{limits.wall_seconds:g} s in all, or {ANSWER_SECONDS:g} s for one answer",
    }
    return UnsafeFileError(
        rule,
        f"{file} needs more than a file may: {uses[rule]}. Nothing was written. If you trust it, give larger limits: "
        "`Limits` in Python, --max-memory and --max-seconds of `penstock convert`.",
    )
