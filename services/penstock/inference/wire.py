"""Inference messages between bytes and objects, so that a large tensor is copied as seldom as can be.

A request's raw contents become views of the bytes that came; an answer is its parts, to be joined once, where they are
sent. Field numbers and wire format: protos/oip/inference.proto, https://protobuf.dev/programming-guides/encoding.
"""

from collections.abc import Sequence

from google.protobuf.message import DecodeError

from penstock.inference.tensors import Buffer
from penstock.oip import inference_pb2 as pb

# Messages above this size are taken apart here; of smaller ones protobuf's own reader is done sooner than we are.
LARGE_BYTES = 32 * 1024

# Tags of length-delimited fields: ModelInferRequest.raw_input_contents (7), ModelInferResponse.raw_output_contents (6),
# ModelStreamInferResponse.infer_response (2).
RAW_INPUT_TAG = bytes([7 << 3 | 2])
_RAW_OUTPUT_TAG = bytes([6 << 3 | 2])
_INFER_RESPONSE_TAG = bytes([2 << 3 | 2])
_LENGTH_DELIMITED = 2


class InferRequest:
    """A request's message, its raw contents in their order, its size, and all of its bytes unless they are many."""

    __slots__ = ("data", "message", "raw", "size")

    def __init__(self, message: pb.ModelInferRequest, raw: Sequence[Buffer], size: int, data: bytes | None) -> None:
        self.message = message
        self.raw = raw
        self.size = size
        self.data = data


def read_infer_request(data: bytes | memoryview) -> InferRequest:
    """Raises `google.protobuf.message.DecodeError` if the bytes are no ModelInferRequest."""
    if len(data) < LARGE_BYTES:
        small = bytes(data)
        message = pb.ModelInferRequest.FromString(small)
        return InferRequest(message, message.raw_input_contents, len(small), small)
    rest, raw = _taken_apart(memoryview(data))
    return InferRequest(pb.ModelInferRequest.FromString(rest), raw, len(data), None)


def raw_output_parts(raw: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """The parts that, behind a serialized ModelInferResponse, are its raw contents."""
    parts: list[bytes | memoryview] = []
    for contents in raw:
        parts += (_RAW_OUTPUT_TAG + varint(len(contents)), contents)
    return parts


def stream_parts(parts: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """The parts of a ModelStreamInferResponse around those of its `infer_response`."""
    return [_INFER_RESPONSE_TAG + varint(sum(map(len, parts))), *parts]


def _taken_apart(data: memoryview) -> tuple[bytes, list[memoryview]]:
    """The top-level fields: all but the raw contents as they stand, and the raw contents."""
    rest: list[memoryview] = []
    raw: list[memoryview] = []
    position, end = 0, len(data)
    while position < end:
        start = position
        tag, position = _read_varint(data, position)
        if tag & 7 == _LENGTH_DELIMITED:
            length, position = _read_varint(data, position)
            if length > end - position:
                raise DecodeError(f"field {tag >> 3} runs past the end of the message")
            if tag == RAW_INPUT_TAG[0]:
                raw.append(data[position : position + length])
                position += length
                continue
            position += length
        else:
            # No field of the message has another wire type; protobuf's reader knows what to make of it.
            position = end
        rest.append(data[start:position])
    return b"".join(rest), raw


def _read_varint(data: memoryview, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise DecodeError("a number of the message does not end")


def varint(value: int) -> bytes:
    """A number as protobuf writes lengths and tags."""
    encoded = bytearray()
    while value > 0x7F:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
