"""Requests that no client in its senses would send, made from the contract's own descriptors. Always the same ones."""

import random
from collections.abc import Iterator
from typing import Any

from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass

TEXTS = [
    *("", "a", "digits", "champion", "1", "-1", "9" * 20, "é", "名前", "\u202e", "a\0b", "A", "x" * 63, "x" * 5000),
    *("..", "../x", "/etc/passwd", "'; drop table model; --", "%s%n", "[/x]"),
    *("model.onnx", "manifest.json", "sha256:", "sha256:" + "0" * 64, "sha256:" + "f" * 64),
    *("FP32", "BYTES", "batch", "MQ==", "/w==", "LTE="),
]
INTEGERS = [0, 1, -1, 2, 100, 2**31 - 1, -(2**31), 2**32 - 1, 2**63 - 1, -(2**63), 2**64 - 1]
FLOATS = [0.0, 0.5, 1.0, -1.0, float("nan"), float("inf"), float("-inf"), 1e308, 5e-324]
MAX_DEPTH = 6

_RANGES = {
    FieldDescriptor.TYPE_INT32: (-(2**31), 2**31 - 1),
    FieldDescriptor.TYPE_UINT32: (0, 2**32 - 1),
    FieldDescriptor.TYPE_INT64: (-(2**63), 2**63 - 1),
    FieldDescriptor.TYPE_UINT64: (0, 2**64 - 1),
}


class Hostile:
    """A source of serialized messages: filled with extremes, cut off, with bytes changed, or noise from the start."""

    def __init__(self, seed: str) -> None:
        self._random = random.Random(seed)

    def message(self, descriptor: Descriptor) -> bytes:
        """The bytes of one request, or what claims to be one."""
        message = GetMessageClass(descriptor)()
        self._fill(message, 0)
        data = bytearray(message.SerializeToString())
        match self._random.randrange(10):
            case 0:
                return self._random.randbytes(self._random.choice([0, 1, 5, 100, 5000]))
            case 1:
                return bytes(data[: self._random.randrange(len(data) + 1)])
            case 2:
                for _ in range(min(len(data), 3)):
                    data[self._random.randrange(len(data))] = self._random.randrange(256)
        return bytes(data)

    def stream(self, descriptor: Descriptor) -> Iterator[bytes]:
        """The messages of a client's stream, none to three."""
        return iter([self.message(descriptor) for _ in range(self._random.randrange(4))])

    def _fill(self, message: Message, depth: int) -> None:
        for field in message.DESCRIPTOR.fields:
            if depth > MAX_DEPTH or self._random.random() < 0.25:
                continue
            if field.message_type and field.message_type.GetOptions().map_entry:
                self._fill_map(getattr(message, field.name), field.message_type, depth)
            elif field.is_repeated:
                self._fill_list(getattr(message, field.name), field, depth)
            elif field.message_type:
                getattr(message, field.name).SetInParent()
                self._fill(getattr(message, field.name), depth + 1)
            else:
                setattr(message, field.name, self._value(field))

    def _fill_map(self, entries: Any, entry: Descriptor, depth: int) -> None:
        key, value = entry.fields_by_name["key"], entry.fields_by_name["value"]
        for _ in range(self._random.randrange(4)):
            if value.message_type:
                self._fill(entries[self._value(key)], depth + 1)
            else:
                entries[self._value(key)] = self._value(value)

    def _fill_list(self, values: Any, field: FieldDescriptor, depth: int) -> None:
        for _ in range(self._random.choice([0, 1, 2, 3, 5])):
            if field.message_type:
                self._fill(values.add(), depth + 1)
            else:
                values.append(self._value(field))

    def _value(self, field: FieldDescriptor) -> Any:
        match field.type:
            case FieldDescriptor.TYPE_STRING:
                return self._random.choice(TEXTS)
            case FieldDescriptor.TYPE_BYTES:
                return self._random.choice([b"", b"\0", b"a,b\n1,2\n", b"\xff" * 1000])
            case FieldDescriptor.TYPE_BOOL:
                return self._random.random() < 0.5
            case FieldDescriptor.TYPE_FLOAT | FieldDescriptor.TYPE_DOUBLE:
                return self._random.choice(FLOATS)
            case FieldDescriptor.TYPE_ENUM:
                return self._random.choice([*field.enum_type.values_by_number, 99, -1])
            case kind:
                low, high = _RANGES[kind]
                return min(max(self._random.choice(INTEGERS), low), high)
