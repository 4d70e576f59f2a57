"""What ONNX Runtime says about a graph, which it tells nobody but standard error."""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager

WARNING = 2
"""ONNX Runtime's severity from which it is listened to."""

_RECORD = re.compile(rb"\S+ \S+ \[[WEF]:onnxruntime:[^,\]]*, (?P<place>[^\]]*)\] (?P<text>.*)")
_COLOURS = re.compile(rb"\x1b\[[0-9;]*m")


@contextmanager
def collected() -> Iterator[list[str]]:
    """Gathers ONNX Runtime's warnings and errors until the block ends; what others write meanwhile comes after it.

    Standard error is the process's: one collection at a time.
    """
    warnings: list[str] = []
    with tempfile.TemporaryFile() as heard:
        error_stream = os.dup(2)
        try:
            os.dup2(heard.fileno(), 2)
            try:
                yield warnings
            finally:
                os.dup2(error_stream, 2)
            heard.seek(0)
            for line in heard:
                if record := _RECORD.match(_COLOURS.sub(b"", line)):
                    warnings.append(record["text"].decode(errors="replace").strip())
                else:
                    os.write(error_stream, line)
        finally:
            os.close(error_stream)
