"""Reads an ONNX file as if an attacker had written it, before ONNX Runtime sees it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError
from onnx import external_data_helper

from penstock.converters.errors import ConversionError, UnsafeFileError

MAX_BYTES = 2**31 - 1
MAX_NODES = 50_000
"""ONNX Runtime's work grows faster than the number of nodes. The largest language models have some ten thousand."""

# What ONNX Runtime runs without a library of somebody's beside it.
_DOMAINS = frozenset({"", "ai.onnx", "ai.onnx.ml", "com.microsoft"})


def read(path: Path, *, with_data: bool = True) -> onnx.ModelProto:
    """The model, with its external data or without.

    Raises `UnsafeFileError`, and `ConversionError` if a file cannot be read.
    """
    try:
        model = _parsed(path)
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
    """Returns if the model uses known operators only, and not more of them than can be gone through in good time."""
    domains = _DOMAINS | {function.domain for function in model.functions}
    for count, node in enumerate(_all_nodes(model), start=1):
        if count > MAX_NODES:
            raise UnsafeFileError("node-count", f"{path} has more than {MAX_NODES:,} nodes; so many are not read.")
        if node.domain not in domains:
            raise UnsafeFileError(
                "known-domains",
                f"{path} uses {node.op_type!r} of the domain {node.domain!r}, which needs code from elsewhere; known "
                f"are {', '.join(sorted(filter(None, _DOMAINS)))}. Export the model with ONNX's own operators.",
            )


def external_tensors(model: onnx.ModelProto) -> Iterator[onnx.TensorProto]:
    """The tensors whose data lie in other files."""
    for tensor in external_data_helper._get_all_tensors(model):  # noqa: SLF001 the only list of them
        if external_data_helper.uses_external_data(tensor):
            yield tensor


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


def _all_nodes(model: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    """Every node, also of inner graphs and functions, without recursion: depth is the attacker's choice."""
    pending = [iter(model.graph.node), *(iter(function.node) for function in model.functions)]
    while pending:
        for node in pending.pop():
            yield node
            for attribute in node.attribute:
                if attribute.HasField("g"):
                    pending.append(iter(attribute.g.node))
                pending += [iter(graph.node) for graph in attribute.graphs]


def _check_external_data(path: Path, model: onnx.ModelProto) -> None:
    for location in sorted({location_of(tensor) for tensor in external_tensors(model)}):
        if not location or location in {".", ".."} or "/" in location or "\\" in location or "\0" in location:
            raise UnsafeFileError(
                "external-data", f"{path} has external data in {location[:80]!r}, which is no file beside it."
            )
        try:
            mode = os.lstat(path.parent / location).st_mode
        except FileNotFoundError:
            raise UnsafeFileError(
                "external-data", f"{path} has external data in {location[:80]!r}, which is missing beside it."
            ) from None
        if not stat.S_ISREG(mode):
            raise UnsafeFileError(
                "no-links", f"{path} has external data in {location[:80]!r}, which is a link or no file at all."
            )
