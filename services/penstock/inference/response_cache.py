"""Answers kept for requests that come again: a bounded memory of what a version said to exactly these inputs."""

import sys
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from penstock.inference.inference import Parameter
from penstock.inference.tensors import Array

# Keys, dictionaries and array objects; without it, tiny answers would cost far more than they are counted.
ENTRY_BYTES = 1024


class Key(NamedTuple):
    """`version` is an identity that no other load of a version has: an answer must not outlive its model."""

    version: str
    digest: bytes


class _Entry(NamedTuple):
    outputs: tuple[Array, ...]
    size: int


class ResponseCache:
    """The answers used last, up to `capacity_bytes` of them. Lives on the event loop.

    For models whose answer depends on their inputs alone: not for sequences, and not for models that draw at random.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self._capacity_bytes = capacity_bytes
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._of_version: dict[str, set[Key]] = {}
        self.bytes = 0
        self.hits = 0
        self.misses = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Key) -> Sequence[Array] | None:
        """The outputs in the order of the key, read-only."""
        entry = self._entries.get(key)
        if entry is None:
            self.misses += 1
            return None
        self.hits += 1
        self._entries.move_to_end(key)
        return entry.outputs

    def put(self, key: Key, outputs: Iterable[Array]) -> None:
        """Keeps copies: the arrays may be views of a whole batch. What alone would overfill the cache is not kept."""
        held = tuple(outputs)
        size = ENTRY_BYTES + sum(map(_size, held))
        self._remove(key)
        if size > self._capacity_bytes:
            return
        self._entries[key] = _Entry(tuple(map(_copy, held)), size)
        self._of_version.setdefault(key.version, set()).add(key)
        self.bytes += size
        while self.bytes > self._capacity_bytes:
            self._remove(next(iter(self._entries)))
            self.evictions += 1

    def drop(self, version: str) -> None:
        """Forgets the answers of a version that is gone."""
        for key in list(self._of_version.get(version, ())):
            self._remove(key)

    def _remove(self, key: Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is None:
            return
        self.bytes -= entry.size
        keys = self._of_version[key.version]
        keys.remove(key)
        if not keys:
            del self._of_version[key.version]


def key(
    version: str, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Parameter] | None = None
) -> Key:
    """Equal for equal requests: the same inputs by name, in whatever order, and the same outputs in the same order.

    Everything of variable length has its length or number in front, so that no two requests run into each other.
    """
    digest = blake2b(digest_size=32)
    _number(digest, len(outputs))
    for name in outputs:
        _bytes(digest, _encoded(name))
    _number(digest, len(inputs))
    for name in sorted(inputs):
        array = inputs[name]
        _bytes(digest, _encoded(name))
        _bytes(digest, f"{array.dtype.str} {array.dtype.name} {array.shape}".encode())
        if array.dtype == object:
            _elements(digest, array)
        else:
            # Not every dtype of numpy has a buffer: ml_dtypes' have none.
            digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    for name in sorted(parameters or {}):
        value = (parameters or {})[name]
        _bytes(digest, _encoded(name))
        _bytes(digest, _encoded(f"{type(value).__name__} {value}"))
    return Key(version, digest.digest())


def _elements(digest: blake2b, array: Array) -> None:
    elements = array.ravel().tolist()
    # Text and its UTF-8 are different inputs to a model that can tell them apart.
    digest.update(bytes(isinstance(element, str) for element in elements))
    encoded = [_encoded(element) if isinstance(element, str) else element for element in elements]
    digest.update(np.fromiter(map(len, encoded), np.int64, len(encoded)).data)
    digest.update(b"".join(encoded))


def _encoded(text: str) -> bytes:
    return text.encode(errors="surrogatepass")


def _bytes(digest: blake2b, data: bytes) -> None:
    _number(digest, len(data))
    digest.update(data)


def _number(digest: blake2b, value: int) -> None:
    digest.update(value.to_bytes(8, "little"))


def _size(array: Array) -> int:
    return array.nbytes + (sum(map(sys.getsizeof, array.ravel().tolist())) if array.dtype == object else 0)


def _copy(array: Array) -> Array:
    copy = np.array(array, order="C")
    copy.setflags(write=False)
    return copy
