"""Reads an ONNX file as if an attacker had written it, before ONNX Runtime sees it."""

import itertools
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper

from penstock.converters.errors import ConversionError, UnsafeFileError
from penstock.converters.onnx_functions import MAX_NODES, all_nodes, check_functions

MAX_BYTES = 2**31 - 1
MAX_CONSTANTS = 50_000
"""ONNX Runtime's work grows with the square of their number."""

# What ONNX Runtime runs without a library of somebody's beside it.
_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})


def read(path: Path, *, with_data: bool = True) -> onnx.ModelProto:
    """The model, with its external data or without.

    Raises `UnsafeFileError`, and `ConversionError` if a file cannot be read.
    """
    try:
        model = _parsed(path)
        model.ClearField("training_info")  # graphs that nobody runs to answer
        check_model(path, model)
        _check_external_data(path, model)
        if with_data:
            onnx.load_external_data_for_model(model, str(path.parent))
    except OSError as error:
        raise ConversionError(f"Cannot read the model {path}: {error.strerror or error}.") from error
    except (onnx.checker.ValidationError, ValueError) as error:
        raise UnsafeFileError("external-data", f"The external data of {path} cannot be read: {error}.") from error
    return model


def check_model(path: Path, model: onnx.ModelProto) -> None:
    """Returns if the model uses known operators only, and has no more parts than can be gone through in good time."""
    constants = len(model.graph.initializer) + len(model.graph.sparse_initializer)
    if constants > MAX_CONSTANTS:
        raise UnsafeFileError(
            "constant-count", f"{path} has {constants:,} initializers; at most {MAX_CONSTANTS:,} are read."
        )
    domains = _DOMAINS | {function.domain for function in model.functions}
    for count, node in enumerate(_nodes(model), start=1):
        if count > MAX_NODES:
            raise UnsafeFileError("node-count", f"{path} has more than {MAX_NODES:,} nodes; so many are not read.")
        if node.domain not in domains:
            raise UnsafeFileError(
                "known-domains",
                f"{path} uses {node.op_type!r} of the domain {node.domain!r}, which needs code from elsewhere; known "
                f"are {', '.join(sorted(filter(None, _DOMAINS)))}. Export the model with ONNX's own operators.",
            )
    check_functions(model, str(path))


def external_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The tensors whose data lie in other files."""
    for tensor in itertools.chain(external_data_helper._get_all_tensors(model), _sparse_parts(model)):  # noqa: SLF001 the only list of them
        if external_data_helper.uses_external_data(tensor):
            yield tensor


def _sparse_parts(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    sparse = list(model.graph.sparse_initializer)
    for node in _nodes(model):
        for attribute in node.attribute:
            sparse += [attribute.sparse_tensor, *attribute.sparse_tensors]
            for graph in (attribute.g, *attribute.graphs):
                sparse += graph.sparse_initializer
    for tensor in sparse:
        yield from (tensor.values, tensor.indices)


def _nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    return all_nodes(model.graph.node, *(function.node for function in model.functions))


def location_of(tensor: onnx.TensorProto) -> str:
    return next((str(entry.value) for entry in tensor.external_data if entry.key == "location"), "")


def _parsed(path: Path) -> onnx.ModelProto:
    size = path.stat().st_size
    if size > MAX_BYTES:
        raise UnsafeFileError("size", f"{path} has {size:,} bytes; an ONNX file has at most {MAX_BYTES:,}.")
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise UnsafeFileError(
            "protobuf", f"{path} is not an ONNX file, or not a whole one: it is no protobuf message of a model."
        ) from error
    if not model.ir_version or not model.graph.output:
        raise UnsafeFileError("protobuf", f"{path} is not an ONNX file: it has no graph with outputs.")
    return model


def _check_external_data(path: Path, model: onnx.ModelProto) -> None:
    for tensor in external_tensors(model):
        location = location_of(tensor)
        shown = f"{path} has external data in {location[:80]!r}"
        if not location or location in {".", ".."} or "/" in location or "\\" in location or "\0" in location:
            raise UnsafeFileError("external-data", f"{shown}, which is no file beside it.")
        try:
            found = os.lstat(path.parent / location)
        except FileNotFoundError:
            raise UnsafeFileError("external-data", f"{shown}, which is missing beside it.") from None
        if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            raise UnsafeFileError("no-links", f"{shown}, which is a link or no file at all.")
        offset, length = (_number(tensor, key) for key in ("offset", "length"))
        if offset < 0 or length < 0 or offset + length > found.st_size:
            raise UnsafeFileError(
                "external-data",
                f"{shown}, {length:,} bytes from byte {offset:,} on, of which the file has {found.st_size:,}.",
            )


def _number(tensor: onnx.TensorProto, key: str) -> int:
    text = next((entry.value for entry in tensor.external_data if entry.key == key), "0")
    return int(text) if text.isascii() and text.isdigit() else -1
