"""The process in which `runtime.Runtime` runs a graph. It speaks frames over standard input and output."""

import os
import sys
from typing import IO, Any

import numpy as np
import onnxruntime

from penstock.converters.tensor_frames import Head, read_frame, write_frame


def main() -> None:
    # What libraries print must not come between frames.
    frames = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    requests = sys.stdin.buffer
    head, _ = read_frame(requests)
    session = _opened(head, frames)
    while session is not None:
        try:
            _, rows = read_frame(requests)
        except EOFError:
            return
        _answer(session, rows, frames)


def _opened(head: Head, frames: IO[bytes]) -> onnxruntime.InferenceSession | None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = head["log_severity"]
    if not head["is_optimized"]:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if head["provider"] != "CPUExecutionProvider":
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    try:
        session = onnxruntime.InferenceSession(head["path"], options, providers=[head["provider"]])
    except Exception as error:  # ONNX Runtime's exceptions share no base but this one
        write_frame(frames, {"error": str(error)}, {})
        return None
    write_frame(frames, {}, {})
    return session


def _answer(session: onnxruntime.InferenceSession, rows: dict[str, Any], frames: IO[bytes]) -> None:
    names = [output.name for output in session.get_outputs()]
    try:
        answers = dict(zip(names, map(np.asarray, session.run(names, rows)), strict=True))
    except Exception as error:  # ONNX Runtime's exceptions share no base but this one
        write_frame(frames, {"error": str(error)}, {})
        return
    write_frame(frames, {}, answers)


if __name__ == "__main__":
    main()
