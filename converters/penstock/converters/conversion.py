"""The way from a trained model to an ONNX file."""

import hashlib
import os
import secrets
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from penstock.converters.errors import ConversionError
from penstock.converters.keras_archive import check_archive
from penstock.converters.parity import ParityReport, Tolerance
from penstock.converters.signature import Signature

Step = Literal["load", "trace", "convert", "verify", "write"]


@dataclass(frozen=True)
class Conversion:
    """A file that passed the gate. `sha256` is in lower-case hexadecimal."""

    path: Path
    signature: Signature
    parity: ParityReport
    opset: int
    ir_version: int
    size_bytes: int
    sha256: str


def convert(
    model: Any,  # noqa: ANN401 Keras publishes no types
    path: str | PathLike[str],
    *,
    samples: Mapping[str, NDArray[Any]] | None = None,
    tolerance: Tolerance | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Conversion:
    """Converts a Sequential or Functional Keras 3 model, live or in a `.keras` file, to the ONNX file `path`.

    The file is written only after the graph has passed the gate: valid, loaded by ONNX Runtime, with the model's own
    names, order, datatypes and shapes, and answering like the model on 1, 2, 7 and 32 seeded random rows, on rows that
    are hard for it (`penstock.converters.rows`) and on `samples`, which hold an array of rows for each input by name.
    Without a `tolerance` each datatype has its own. An existing file is replaced at once. `on_step`
    hears of each step as it begins. Logging and TensorFlow's graphs are global: one conversion at a time in a process.

    Raises `UnsupportedModelError` if ONNX or the converter cannot say what the model does, `GateError` if the graph
    is not the model, `UnsafeFileError` if the `.keras` file breaks a rule for untrusted files, `InvalidSamplesError`
    if the samples do not fit the inputs, and `ConversionError` if a file cannot be read or written.
    """
    announce = on_step or _silently
    target = Path(path)
    if not target.parent.is_dir():
        raise ConversionError(f"Cannot write {target}: its folder {target.parent} does not exist. Create it first.")
    announce("load")
    archive = _checked(Path(model)) if isinstance(model, str | PathLike) else None
    _quiet_tensorflow()
    from penstock.converters import gate, keras_source, naming, tf2onnx_route  # noqa: PLC0415 seconds of TensorFlow
    from penstock.converters.probe import probe  # noqa: PLC0415 seconds of TensorFlow

    source = keras_source.KerasSource(model if archive is None else keras_source.load(archive))
    announce("trace")
    asked = probe(source, samples)
    traced = tf2onnx_route.trace(source)
    announce("convert")
    graph = tf2onnx_route.to_onnx(traced, source)
    graph = naming.finish(graph, asked.signature, traced.inputs, traced.outputs, source.name)
    announce("verify")
    parity = gate.verify(graph, asked, tolerance, source.description)
    announce("write")
    content: bytes = graph.SerializeToString(deterministic=True)
    _write(target, content)
    return Conversion(
        path=target,
        signature=asked.signature,
        parity=parity,
        opset=tf2onnx_route.OPSET,
        ir_version=naming.IR_VERSION,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
    )


def _silently(_: Step) -> None:
    pass


def _checked(path: Path) -> Path:
    try:
        check_archive(path)
    except OSError as error:
        raise ConversionError(f"Cannot read the model {path}: {error.strerror}.") from error
    return path


def _quiet_tensorflow() -> None:
    """TensorFlow reads these once, when it is loaded; whoever set them, or loaded it before, has decided otherwise."""
    if "tensorflow" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        # Announced before the log level is known; and its other rounding would only blur the comparison.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")


def _write(target: Path, content: bytes) -> None:
    """All or nothing: a crash leaves the old file, or none."""
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(4)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except OSError as error:
        raise ConversionError(
            f"Cannot write {target}: {error.strerror}. The folder must be writable and have room."
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
