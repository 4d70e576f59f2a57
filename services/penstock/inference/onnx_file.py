"""What an ONNX file names: the files of its external data, and its operators.

Reads the few fields of onnx.proto that lead there straight from the wire format and steps over the weights, so that
neither the onnx package nor a second copy of them is needed, and nothing is opened before the names are checked.
"""

import mmap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from penstock.inference.folder import is_name
from penstock.rpc.errors import WrongStateError

# message -> field number -> what is in it, for every path from ModelProto to what is read (onnx.proto, IR version 13).
_MESSAGES: Mapping[str, Mapping[int, str]] = {
    "Model": {7: "Graph", 20: "TrainingInfo", 25: "Function"},
    "TrainingInfo": {1: "Graph", 2: "Graph"},
    "Function": {7: "Node", 11: "Attribute"},
    "Graph": {1: "Node", 5: "Tensor", 15: "SparseTensor"},
    "Node": {4: "Operator", 5: "Attribute"},
    "Attribute": {5: "Tensor", 6: "Graph", 10: "Tensor", 11: "Graph", 22: "SparseTensor", 23: "SparseTensor"},
    "SparseTensor": {1: "Tensor", 2: "Tensor"},
    "Tensor": {13: "Entry"},
}
# Protobuf's own limit: what is nested deeper, no reader takes.
_MAX_DEPTH = 100
_ENTRY_KEY = 1
_ENTRY_VALUE = 2

_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def external_locations(model: Path) -> set[str]:
    """Every location of external data in an ONNX file, as written there. Blocks.

    Raises `WrongStateError` if the file is no protobuf message.
    """
    if model.stat().st_size == 0:
        return set()
    with _content(model) as data:
        return {name for first, last in _found(data, "Entry") for name in _location(data, first, last)}


def operators(model: Path) -> set[str]:
    """The operators of an ONNX file, whatever their domain, those of graphs in its graphs too. Blocks.

    Raises `WrongStateError` if the file is no protobuf message.
    """
    with _content(model) as data:
        return {data[first:last].decode() for first, last in _found(data, "Operator")}


def check_external_data(model: Path) -> None:
    """Raises `WrongStateError` for external data that does not lie beside the model. Blocks."""
    for location in sorted(external_locations(model)):
        if not is_name(location) or not (model.parent / location).is_file():
            raise WrongStateError(f"{model.name} has external data in {location[:80]!r}, which is no file beside it.")


@contextmanager
def _content(model: Path) -> Iterator[mmap.mmap]:
    with model.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            yield data
        except (IndexError, UnicodeDecodeError, ValueError) as error:
            raise WrongStateError(f"The model is not an ONNX file: {error}.") from error


def _found(data: mmap.mmap, wanted: str) -> Iterator[tuple[int, int]]:
    """Start and end of all that is wanted.

    Goes down before it goes on: a file of millions of empty messages takes no more memory than one.
    """
    open_messages = [("Model", _fields(data, 0, len(data)))]
    while open_messages:
        message, fields = open_messages[-1]
        inner = _MESSAGES[message]
        for number, first, last in fields:
            if inner.get(number) == wanted:
                yield first, last
            if inner.get(number) not in _MESSAGES:
                continue
            if len(open_messages) == _MAX_DEPTH:
                raise ValueError(f"messages in messages, {_MAX_DEPTH} deep, at byte {first}")
            open_messages.append((inner[number], _fields(data, first, last)))
            break
        else:
            open_messages.pop()


def _location(data: mmap.mmap, start: int, end: int) -> Iterator[str]:
    fields = {number: data[first:last] for number, first, last in _fields(data, start, end)}
    if fields.get(_ENTRY_KEY) == b"location":
        yield fields.get(_ENTRY_VALUE, b"").decode()


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Number, start and end of every length-delimited field between two offsets."""
    position = start
    while position < end:
        tag, position = _varint(data, position)
        if tag >= 1 << 32:
            raise ValueError(f"tag {tag} at byte {position}")
        number, wire_type = tag >> 3, tag & 7
        if wire_type == _VARINT:
            _, position = _varint(data, position)
        elif wire_type == _FIXED64:
            position += 8
        elif wire_type == _FIXED32:
            position += 4
        elif wire_type == _LENGTH:
            length, first = _varint(data, position)
            position = first + length
            if position <= end:
                yield number, first, position
        else:
            raise ValueError(f"wire type {wire_type} at byte {position}")
        if position > end:
            raise ValueError(f"field {number} at byte {position} runs past its message")


def _varint(data: mmap.mmap, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError(f"varint of more than 10 bytes at byte {position}")
