"""numpy arrays as tensors of the Open Inference Protocol, raw both ways."""

import struct
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from penstock.oip import inference_pb2 as pb

Array = npt.NDArray[np.generic] | npt.NDArray[np.object_]

DTYPES: dict[str, np.dtype[np.generic]] = {
    "BOOL": np.dtype("?"),
    "UINT8": np.dtype("u1"),
    "UINT16": np.dtype("<u2"),
    "UINT32": np.dtype("<u4"),
    "UINT64": np.dtype("<u8"),
    "INT8": np.dtype("i1"),
    "INT16": np.dtype("<i2"),
    "INT32": np.dtype("<i4"),
    "INT64": np.dtype("<i8"),
    "FP16": np.dtype("<f2"),
    "FP32": np.dtype("<f4"),
    "FP64": np.dtype("<f8"),
}
_DATATYPES = {dtype: name for name, dtype in DTYPES.items()}


def encode_tensor(name: str, array: Array) -> tuple[pb.ModelInferRequest.InferInputTensor, bytes]:
    """A tensor's description and its raw bytes. Text and bytes (dtypes U, S and object) become BYTES, text as UTF-8.

    Raises `TypeError` for a dtype or an element that the protocol does not have, `ValueError` for text that UTF-8
    cannot write.
    """
    if array.dtype.kind in "OUS":
        elements = [_element(name, item) for item in array.ravel().tolist()]
        raw = b"".join(struct.pack("<I", len(element)) + element for element in elements)
        return pb.ModelInferRequest.InferInputTensor(name=name, datatype="BYTES", shape=array.shape), raw
    datatype = _DATATYPES.get(array.dtype.newbyteorder("<") if array.dtype.itemsize > 1 else array.dtype)
    if datatype is None:
        raise TypeError(
            f"Input {name!r}: dtype {array.dtype} has no datatype in the protocol; use one of {', '.join(DTYPES)}."
        )
    description = pb.ModelInferRequest.InferInputTensor(name=name, datatype=datatype, shape=array.shape)
    return description, np.ascontiguousarray(array, DTYPES[datatype]).tobytes()


def decode_tensor(description: pb.ModelInferResponse.InferOutputTensor, raw: bytes) -> Array:
    """An output as an array that views `raw`; BYTES becomes an object array of `bytes`.

    Raises `ValueError` if the bytes do not fit the description.
    """
    shape = tuple(description.shape)
    if description.datatype == "BYTES":
        elements = list(_elements(raw))
        array = np.empty(len(elements), object)
        array[:] = elements
        return array.reshape(shape)
    return np.frombuffer(raw, DTYPES[description.datatype]).reshape(shape)


def _element(name: str, item: object) -> bytes:
    if isinstance(item, str):
        try:
            return item.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"Input {name!r}: {item[:40]!r} has a character that UTF-8 cannot write.") from error
    if isinstance(item, bytes):
        return item
    raise TypeError(f"Input {name!r}: expected str or bytes as elements; got {type(item).__name__}.")


def _elements(raw: bytes) -> Iterator[bytes]:
    position = 0
    while position < len(raw):
        (length,) = struct.unpack_from("<I", raw, position)
        position += 4 + length
        if position > len(raw):
            raise ValueError(f"A BYTES element of {length} bytes ends after the tensor's {len(raw)}.")
        yield raw[position - length : position]
