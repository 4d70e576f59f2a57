"""Tensors between the wire of the Open Inference Protocol and numpy.

Little-endian and row-major on the wire, whatever the machine. Nothing is allocated for a tensor before its shape and
its bytes agree: shapes come from strangers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from penstock.oip import inference_pb2 as pb

Array = npt.NDArray[Any]
Buffer = bytes | memoryview | npt.NDArray[np.uint8]

# An axis of zero makes a tensor of no bytes out of any shape; a model may then reduce that axis away and be left with
# the others. A client gets no more elements for nothing than this.
MAX_EMPTY_SPAN = 2**24

_LENGTH_BYTES = 4

# A view costs more to make than so few bytes to copy.
_VIEW_BYTES = 4096


@dataclass(frozen=True)
class Datatype:
    """A datatype of the protocol: its numpy dtype, and the list of InferTensorContents that carries it, if one does."""

    name: str
    dtype: np.dtype[Any]
    contents: str | None


BYTES = Datatype("BYTES", np.dtype(object), "bytes_contents")
BOOL = Datatype("BOOL", np.dtype("?"), "bool_contents")
BF16 = Datatype("BF16", np.dtype(ml_dtypes.bfloat16), None)

DATATYPES = {
    datatype.name: datatype
    for datatype in (
        BOOL,
        Datatype("UINT8", np.dtype("u1"), "uint_contents"),
        Datatype("UINT16", np.dtype("<u2"), "uint_contents"),
        Datatype("UINT32", np.dtype("<u4"), "uint_contents"),
        Datatype("UINT64", np.dtype("<u8"), "uint64_contents"),
        Datatype("INT8", np.dtype("i1"), "int_contents"),
        Datatype("INT16", np.dtype("<i2"), "int_contents"),
        Datatype("INT32", np.dtype("<i4"), "int_contents"),
        Datatype("INT64", np.dtype("<i8"), "int64_contents"),
        Datatype("FP16", np.dtype("<f2"), None),
        BF16,
        Datatype("FP32", np.dtype("<f4"), "fp32_contents"),
        Datatype("FP64", np.dtype("<f8"), "fp64_contents"),
        BYTES,
    )
}


class TensorError(ValueError):
    """A tensor's data does not fit its description. The text says what was expected and what came."""


def element_count(shape: Sequence[int]) -> int:
    """The product of all axes; 1 for a scalar.

    Raises `TensorError` for a negative axis, or an empty tensor whose other axes span more than `MAX_EMPTY_SPAN`.
    """
    if any(axis < 0 for axis in shape):
        raise TensorError(f"expected axes of at least 0; got {list(shape)}")
    count = math.prod(shape)
    if count == 0 and math.prod(axis for axis in shape if axis) > MAX_EMPTY_SPAN:
        raise TensorError(f"expected the axes of an empty tensor to span at most {MAX_EMPTY_SPAN}; got {list(shape)}")
    return count


def decode_raw(datatype: Datatype, shape: Sequence[int], data: Buffer, *, any_bytes: bool = False) -> Array:
    """A read-only view of `data`; for BYTES an object array of `str`, because a tensor of strings is text to ONNX.

    With `any_bytes`, elements that are not UTF-8 are `bytes`.
    Raises `TensorError` if the bytes do not fit datatype and shape.
    """
    count = element_count(shape)
    if datatype is BYTES:
        return _split_strings(bytes(data), count, any_bytes).reshape(shape)
    expected = count * datatype.dtype.itemsize
    if len(data) != expected:
        raise TensorError(f"expected {expected} bytes for {datatype.name} {list(shape)}; got {len(data)}")
    if datatype is BOOL:
        flags = np.frombuffer(data, np.uint8)
        if flags.max(initial=0) > 1:
            raise TensorError(f"expected a byte of 0 or 1 for each BOOL; got {flags.max()}")
        return flags.view(np.bool_).reshape(shape)
    return np.frombuffer(data, datatype.dtype).reshape(shape)


def decode_typed(
    datatype: Datatype, shape: Sequence[int], contents: pb.InferTensorContents, *, any_bytes: bool = False
) -> Array:
    """The elements of the one list that fits the datatype, as `decode_raw` gives them.

    Raises `TensorError` for another list, another number of elements, or an element outside the datatype's range.
    """
    count = element_count(shape)
    if datatype.contents is None:
        raise TensorError(f"{datatype.name} has no typed contents; send it in raw_input_contents")
    wrong = [field.name for field, _ in contents.ListFields() if field.name != datatype.contents]
    if wrong:
        raise TensorError(f"expected {datatype.name} in {datatype.contents}; got {', '.join(wrong)}")
    values = getattr(contents, datatype.contents)
    if len(values) != count:
        raise TensorError(f"expected {count} elements for {datatype.name} {list(shape)}; got {len(values)}")
    if datatype is BYTES:
        elements = np.empty(count, object)
        elements[:] = [_text(value, index, any_bytes) for index, value in enumerate(values)]
        return elements.reshape(shape)
    if datatype.contents in ("int_contents", "uint_contents"):
        _check_range(datatype, values)
    return np.fromiter(values, datatype.dtype, count).reshape(shape)


def encode_raw(datatype: Datatype, array: Array) -> bytes | memoryview:
    """The raw bytes of an array whose dtype is the datatype's, a view of it where that can be; `str` as UTF-8."""
    if datatype is BYTES:
        elements = [item if isinstance(item, bytes) else item.encode() for item in array.ravel().tolist()]
        return b"".join(part for element in elements for part in (_length(element), element))
    if array.nbytes < _VIEW_BYTES:
        return array.astype(datatype.dtype, copy=False).tobytes()
    return np.ascontiguousarray(array, datatype.dtype).reshape(-1).view(np.uint8).data


def _length(element: bytes) -> bytes:
    return len(element).to_bytes(_LENGTH_BYTES, "little")


def _split_strings(data: bytes, count: int, any_bytes: bool) -> Array:
    if count * _LENGTH_BYTES > len(data):
        raise TensorError(f"expected {count} BYTES elements, each with a length of 4 bytes; got {len(data)} bytes")
    elements = np.empty(count, object)
    end = 0
    for index in range(count):
        start = end + _LENGTH_BYTES
        if start > len(data):
            raise TensorError(f"expected {count} BYTES elements; the data ends before the length of element {index}")
        end = start + int.from_bytes(data[end:start], "little")
        if end > len(data):
            raise TensorError(
                f"BYTES element {index} claims {end - start} bytes; the data has {len(data) - start} more"
            )
        elements[index] = _text(data[start:end], index, any_bytes)
    if end != len(data):
        raise TensorError(f"expected {count} BYTES elements in {end} bytes; got {len(data)} bytes")
    return elements


def _text(element: bytes, index: int, any_bytes: bool) -> str | bytes:
    try:
        return element.decode()
    except UnicodeDecodeError as error:
        if any_bytes:
            return element
        raise TensorError(
            f"BYTES element {index} is not UTF-8, which a string tensor must be: {error.reason}"
        ) from None


def _check_range(datatype: Datatype, values: Sequence[int]) -> None:
    """INT8, UINT16 … travel as 32-bit numbers, so some that come do not fit."""
    limits = np.iinfo(datatype.dtype)
    for value in (min(values, default=0), max(values, default=0)):
        if not limits.min <= value <= limits.max:
            raise TensorError(f"expected {datatype.name} elements from {limits.min} to {limits.max}; got {value}")
