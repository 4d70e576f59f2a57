"""System shared memory of clients on this machine: tensors that do not travel over the wire (Triton's extension).

The key of a region comes from a stranger, and the region stays the stranger's: it may be truncated at any time, and
whoever then touches a mapping of it is killed by SIGBUS. So nothing is mapped; every read and write is a system call,
which comes back short instead.
"""

import errno
import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.rpc.errors import (
    ExistsError,
    InvalidFieldError,
    LimitExceededError,
    NotFoundError,
    StorageFullError,
    UnimplementedError,
)

# Where Linux shows POSIX shared memory objects as files.
_FOLDER = "/dev/shm"  # noqa: S108  # not a temporary file of ours
# glibc keeps named semaphores beside the objects, as sem.NAME, and the Envoy that this server may run inside its own
# memory: written to, they would hang or kill their owners.
_KEY = re.compile(r"/?((?![.]|sem[.]|envoy_shared_memory)[^/\0]+)")
_KEY_BYTES = 255

MAX_NAME = 256
MAX_REGIONS = 1024
# Regions may be sparse, and then larger than any memory; what is read of them is copied.
MAX_TENSOR_BYTES = 2**30

REGION = "shared_memory_region"
OFFSET = "shared_memory_offset"
BYTE_SIZE = "shared_memory_byte_size"

Data = bytes | memoryview | npt.NDArray[Any]


@dataclass(frozen=True)
class Region:
    """A window of a client's shared memory object, under the name that its requests use."""

    name: str
    key: str
    offset: int
    byte_size: int


class SharedMemory:
    """Owns the registered regions and their descriptors.

    Lives on the event loop: a descriptor that is closed while a thread uses its number may be another file's by then.
    Everything but `close` raises `UnimplementedError` where the operator has not allowed it.
    """

    def __init__(self, allowed: bool, max_tensor_bytes: int = MAX_TENSOR_BYTES) -> None:
        self._allowed = allowed
        self._max_tensor_bytes = max_tensor_bytes
        self._regions: dict[str, Region] = {}
        self._descriptors: dict[str, int] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Opens the object that `key` names.

        Raises `InvalidFieldError` for a key that names no object, or a window that is not inside it; `ExistsError` for
        a name that is taken; `LimitExceededError` above `MAX_REGIONS`.
        """
        require_allowed(self._allowed)
        check_new_name(name, self._regions)
        descriptor = _opened(key)
        try:
            _check_window(offset, byte_size, os.fstat(descriptor).st_size, key)
        except BaseException:
            os.close(descriptor)
            raise
        self._regions[name] = Region(name, key, offset, byte_size)
        self._descriptors[name] = descriptor

    def unregister(self, name: str) -> None:
        """Forgets a region; "" all of them. As with Triton, one that is not registered is no error."""
        require_allowed(self._allowed)
        for known in [name] if name else list(self._regions):
            if self._regions.pop(known, None) is not None:
                os.close(self._descriptors.pop(known))

    def status(self, name: str) -> Sequence[Region]:
        """The region of that name, for "" all. Raises `NotFoundError` for one that is not registered."""
        require_allowed(self._allowed)
        return [self._region(name)] if name else list(self._regions.values())

    def read(self, name: str, offset: int, byte_size: int) -> npt.NDArray[np.uint8]:
        """A copy of `byte_size` bytes from `offset` within the region: its owner may change them while they are used.

        Raises `NotFoundError`, `InvalidFieldError` for bounds outside the region or a region that has shrunk since,
        `LimitExceededError` above `max_tensor_bytes`.
        """
        require_allowed(self._allowed)
        region = self._region(name)
        check_bounds(name, region.byte_size, offset, byte_size, self._max_tensor_bytes)
        content = np.empty(byte_size, np.uint8)
        view = content.data
        done = 0
        while done < byte_size:
            # One call reads at most 2 GiB.
            count = os.preadv(self._descriptors[name], [view[done:]], region.offset + offset + done)
            if not count:
                raise _shrunk(region)
            done += count
        return content

    def write(self, name: str, offset: int, byte_size: int, data: Data) -> None:
        """Writes `data` from `offset` on, into a window of `byte_size` bytes, which it may leave partly as it is.

        Raises as `read`, and `StorageFullError` where the machine has no memory for the object's pages.
        """
        require_allowed(self._allowed)
        region = self._region(name)
        check_bounds(name, region.byte_size, offset, byte_size, self._max_tensor_bytes)
        view = byte_view(data)
        check_fits(name, byte_size, view.nbytes)
        descriptor = self._descriptors[name]
        start = region.offset + offset
        # Without this a write would let an object grow that its owner has made smaller.
        if os.fstat(descriptor).st_size < start + view.nbytes:
            raise _shrunk(region)
        done = 0
        while done < view.nbytes:
            try:
                done += os.pwrite(descriptor, view[done:], start + done)
            except OSError as error:
                raise StorageFullError(
                    f"Writing to shared memory region {name[:80]!r} failed: {error.strerror}. Free memory in {_FOLDER}."
                ) from error

    def close(self) -> None:
        """Closes every descriptor."""
        self._regions.clear()
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])

    def _region(self, name: str) -> Region:
        region = self._regions.get(name)
        if region is None:
            raise unknown_region(name)
        return region


def require_allowed(allowed: bool) -> None:
    """Raises `UnimplementedError` if clients may not name memory of this machine."""
    if not allowed:
        raise UnimplementedError(
            "Shared memory is off: whoever may name a region can read and write memory of other programs on this "
            "machine. Start the server with --allow-client-shm, or send the tensors in the request."
        )


def check_new_name(name: str, known: dict[str, Any]) -> None:
    """A region's name is free, of bearable length, and there is room for one more."""
    if not 0 < len(name) <= MAX_NAME:
        raise InvalidFieldError.of("name", f"expected 1 to {MAX_NAME} characters; got {len(name)}")
    if name in known:
        raise ExistsError(
            f"Shared memory region {name!r} is registered already. Unregister it first, or take another name."
        )
    if len(known) >= MAX_REGIONS:
        raise LimitExceededError(f"There are {MAX_REGIONS} shared memory regions already. Unregister some first.")


def check_bounds(name: str, region_size: int, offset: int, byte_size: int, most: int) -> None:
    """A tensor's window lies inside its region, and is not larger than this server takes."""
    if offset < 0:
        raise InvalidFieldError.of(OFFSET, f"expected at least 0; got {offset}")
    # A tensor with an axis of zero has no bytes.
    if byte_size < 0:
        raise InvalidFieldError.of(BYTE_SIZE, f"expected at least 0; got {byte_size}")
    if offset + byte_size > region_size:
        raise InvalidFieldError.of(
            BYTE_SIZE,
            f"expected a window inside region {name[:80]!r}, which has {region_size:,} bytes; got {byte_size:,} bytes "
            f"from offset {offset:,}",
        )
    if byte_size > most:
        raise LimitExceededError(f"A tensor in shared memory may have {most:,} bytes; got {byte_size:,}.")


def check_fits(name: str, byte_size: int, needed: int) -> None:
    """The window that the request gave an output is large enough for it."""
    if needed > byte_size:
        raise InvalidFieldError.of(
            BYTE_SIZE, f"expected room for {needed:,} bytes of output in region {name[:80]!r}; got {byte_size:,}"
        )


def byte_view(data: Data) -> memoryview:
    """The bytes of contiguous data, not copied."""
    if isinstance(data, np.ndarray):
        # Not every dtype of numpy has a buffer: ml_dtypes' have none.
        return np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    return memoryview(data).cast("B")


def unknown_region(name: str) -> NotFoundError:
    return NotFoundError("shared memory region", name[:80], "Register it before you name it in a request.")


def _opened(key: str) -> int:
    match = _KEY.fullmatch(key)
    # Surrogates cannot come over the wire, but nothing here should rely on it.
    if match is None or len(key.encode(errors="replace")) > _KEY_BYTES:
        raise InvalidFieldError.of(
            "key",
            f"expected the name of a shared memory object: at most {_KEY_BYTES} bytes, an optional '/' in front and "
            f"none in it, not beginning with '.', 'sem.' or 'envoy_shared_memory'; got {key[:80]!r}",
        )
    # O_NONBLOCK: a pipe under that name must not hold the server up.
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
    try:
        descriptor = os.open(f"{_FOLDER}/{match[1]}", flags)
    except (OSError, UnicodeError) as error:
        raise InvalidFieldError.of("key", f"{key[:80]!r} cannot be opened: {_reason(error)}") from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise InvalidFieldError.of("key", f"{key[:80]!r} is no shared memory object")
    return descriptor


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return "it is not valid Unicode"
    if error.errno == errno.ENOENT:
        return "there is no such object; create it before you register it, in the same container as this server"
    if error.errno == errno.ELOOP:
        return "it is a symbolic link"
    return error.strerror or str(error)


def _check_window(offset: int, byte_size: int, object_size: int, key: str) -> None:
    if offset < 0:
        raise InvalidFieldError.of("offset", f"expected at least 0; got {offset}")
    if byte_size < 1:
        raise InvalidFieldError.of("byte_size", f"expected at least 1; got {byte_size}")
    if offset + byte_size > object_size:
        raise InvalidFieldError.of(
            "byte_size",
            f"expected a window inside {key[:80]!r}, which has {object_size:,} bytes; got {byte_size:,} bytes from "
            f"offset {offset:,}",
        )


def _shrunk(region: Region) -> InvalidFieldError:
    return InvalidFieldError.of(
        REGION, f"{region.name!r} has become smaller since it was registered: its object {region.key!r} was truncated"
    )
