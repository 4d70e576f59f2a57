"""Named tensors over a pipe between two processes of our own: a JSON head, then the elements. Nothing is unpickled."""

import json
from collections.abc import Mapping
from math import prod
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

Head = dict[str, Any]
_TEXT = "text"


def write_frame(stream: IO[bytes], head: Head, tensors: Mapping[str, NDArray[Any]]) -> None:
    """Raises `BrokenPipeError` if nobody reads."""
    bodies = [_body(array) for array in tensors.values()]
    described = [
        [name, _TEXT if array.dtype == object else array.dtype.name, array.shape, len(body)]
        for (name, array), body in zip(tensors.items(), bodies, strict=True)
    ]
    content = json.dumps({"head": head, "tensors": described}).encode()
    stream.write(len(content).to_bytes(8, "big"))
    stream.write(content)
    for body in bodies:
        stream.write(body)
    stream.flush()


def read_frame(stream: IO[bytes], *, max_bytes: int = 2**63 - 1) -> tuple[Head, dict[str, NDArray[Any]]]:
    """Raises `EOFError` if the other side has gone, or if its frame has a part above `max_bytes`."""
    content = json.loads(_exactly(stream, int.from_bytes(_exactly(stream, 8), "big"), max_bytes))
    tensors = {
        name: _array(_exactly(stream, length, max_bytes), dtype, shape)
        for name, dtype, shape, length in content["tensors"]
    }
    return content["head"], tensors


def _body(array: NDArray[Any]) -> bytes | memoryview:
    if array.dtype == object:
        return json.dumps(array.ravel().tolist()).encode()
    # A memoryview of no elements cannot be cast.
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data if array.size else b""


def _array(body: bytearray, dtype: str, shape: list[int]) -> NDArray[Any]:
    if dtype == _TEXT:
        texts = np.empty(prod(shape), object)
        texts[:] = json.loads(body)
        return texts.reshape(shape)
    return np.frombuffer(body, dtype).reshape(shape)


def _exactly(stream: IO[bytes], length: int, max_bytes: int = 8) -> bytearray:
    if length > max_bytes:
        raise EOFError
    content = bytearray(length)
    view, done = memoryview(content), 0
    while done < length:
        count = stream.readinto(view[done:])  # type: ignore[attr-defined]  # every binary pipe has it
        if not count:
            raise EOFError
        done += count
    return content
