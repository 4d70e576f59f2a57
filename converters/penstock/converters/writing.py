"""Puts a graph on disk: all of it or nothing, and large weights in a file of their own."""

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from penstock.converters.errors import ConversionError

EXTERNAL_ABOVE_BYTES = 1_500_000_000
"""A graph above this has its weights in another file: one protobuf message ends at 2 GiB, and readers copy it."""
_EXTERNAL_TENSOR_BYTES = 1024
"""Smaller weights stay in the graph, where shape inference reads them."""
_COPIED_BYTES = 2**20


@dataclass(frozen=True)
class Written:
    """`sha256` is of the graph's file, in which the name of `data` has the digest of the weights."""

    size_bytes: int
    sha256: str
    data: Path | None


def write(target: Path, model: Any) -> Written:  # noqa: ANN401 ONNX publishes no types
    """Writes the model to `target`, all or nothing: a crash leaves the old model, or none. Raises `ConversionError`."""
    from penstock.converters import weights  # noqa: PLC0415 loads ONNX

    with _telling(target):
        if weights.size_bytes(model) <= EXTERNAL_ABOVE_BYTES:
            return _write_graph(target, model, None)
        return _write_with_data(target, model)


def place(target: Path, graph: Path, data: Path | None) -> None:
    """Copies what `write` has written elsewhere to `target`, all or nothing. Raises `ConversionError`."""
    with _telling(target):
        if data is None:
            _copy(graph, target)
            return
        beside = target.with_name(data.name)
        is_new = not beside.exists()
        _copy(data, beside)
        try:
            _copy(graph, target)
        except BaseException:
            if is_new:
                beside.unlink(missing_ok=True)
            raise


@contextmanager
def _telling(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConversionError(
            f"Cannot write {target}: {error.strerror}. The folder must be writable and have room."
        ) from error


def _copy(source: Path, target: Path) -> None:
    temporary = _temporary(target)
    try:
        with source.open("rb") as read, temporary.open("xb") as file:
            shutil.copyfileobj(read, file, _COPIED_BYTES)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def _write_with_data(target: Path, model: Any) -> Written:  # noqa: ANN401 ONNX publishes no types
    """The weights' file is named by its digest: until the graph is replaced, the old graph still finds the old one."""
    temporary = _temporary(target)
    try:
        data, graph = _split(model, temporary, target)
        is_new = not data.exists()
        temporary.replace(data)
        try:
            return _write_graph(target, graph, data)
        except BaseException:
            if is_new:
                data.unlink(missing_ok=True)
            raise
    finally:
        temporary.unlink(missing_ok=True)


def _split(model: Any, temporary: Path, target: Path) -> tuple[Path, Any]:  # noqa: ANN401 ONNX publishes no types
    """Writes the large weights to `temporary`; returns the file that it will be, and a graph that names it."""
    from onnx import TensorProto, external_data_helper  # noqa: PLC0415 only for large models

    from penstock.converters import weights  # noqa: PLC0415 loads ONNX

    graph = weights.without_weights(model)
    digest = hashlib.sha256()
    moved: list[tuple[Any, int, int]] = []
    with temporary.open("xb") as file:
        for tensor in model.graph.initializer:
            content: bytes = tensor.raw_data  # each look at it is a copy
            if len(content) < _EXTERNAL_TENSOR_BYTES:
                graph.graph.initializer.append(tensor)
                continue
            known = TensorProto(name=tensor.name, dims=tensor.dims, data_type=tensor.data_type, raw_data=b"")
            graph.graph.initializer.append(known)
            moved.append((graph.graph.initializer[-1], file.tell(), len(content)))
            file.write(content)
            digest.update(content)
        file.flush()
        os.fsync(file.fileno())
    data = target.with_name(f"{target.stem}-{digest.hexdigest()[:16]}.data")
    for tensor, offset, length in moved:
        external_data_helper.set_external_data(tensor, data.name, offset=offset, length=length)
        tensor.ClearField("raw_data")
    return data, graph


def _write_graph(target: Path, model: Any, data: Path | None) -> Written:  # noqa: ANN401 ONNX publishes no types
    content: bytes = model.SerializeToString(deterministic=True)
    temporary = _temporary(target)
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)
    size_bytes = len(content) + (data.stat().st_size if data else 0)
    return Written(size_bytes, hashlib.sha256(content).hexdigest(), data)


def _temporary(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(4)}")
