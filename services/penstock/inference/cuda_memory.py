"""CUDA shared memory of clients on this machine: device memory that a client exports with cudaIpcGetMemHandle.

Only ctypes over the CUDA runtime; where there is no runtime or no device, every call says so.
"""

import contextlib
import ctypes
import ctypes.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from penstock.inference.shared_memory import (
    MAX_TENSOR_BYTES,
    REGION,
    Data,
    byte_view,
    check_bounds,
    check_fits,
    check_new_name,
    require_allowed,
    unknown_region,
)
from penstock.rpc.errors import InvalidFieldError, UnimplementedError

HANDLE_BYTES = 64
_LAZY_ENABLE_PEER_ACCESS = 1
_TO_DEVICE = 1
_TO_HOST = 2
_RUNTIMES = ("libcudart.so.13", "libcudart.so.12", "libcudart.so.11.0", "libcudart.so")


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)


class CudaError(Exception):
    """What the CUDA runtime or driver said."""


class Cuda:
    """The few functions of CUDA that are needed, with checked results."""

    def __init__(self, runtime: ctypes.CDLL, driver: ctypes.CDLL, devices: int) -> None:
        self._runtime = runtime
        self._driver = driver
        self.devices = devices
        runtime.cudaGetErrorString.restype = ctypes.c_char_p
        runtime.cudaIpcOpenMemHandle.argtypes = [ctypes.POINTER(ctypes.c_void_p), _Handle, ctypes.c_uint]
        runtime.cudaIpcCloseMemHandle.argtypes = [ctypes.c_void_p]
        runtime.cudaMemcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        driver.cuMemGetAddressRange_v2.argtypes = [
            ctypes.POINTER(ctypes.c_uint64),
            ctypes.POINTER(ctypes.c_size_t),
            ctypes.c_uint64,
        ]

    @contextlib.contextmanager
    def device(self, number: int) -> Iterator[None]:
        """The thread's current device inside the block; ONNX Runtime relies on what it was before."""
        before = ctypes.c_int()
        self._call(self._runtime.cudaGetDevice, ctypes.byref(before))
        self._call(self._runtime.cudaSetDevice, number)
        try:
            yield
        finally:
            self._call(self._runtime.cudaSetDevice, before.value)

    def open(self, raw_handle: bytes) -> tuple[int, int]:
        """Address of the exported memory, and bytes from there to the end of its allocation."""
        address = ctypes.c_void_p()
        handle = _Handle.from_buffer_copy(raw_handle)
        self._call(self._runtime.cudaIpcOpenMemHandle, ctypes.byref(address), handle, _LAZY_ENABLE_PEER_ACCESS)
        start = address.value or 0
        base, size = ctypes.c_uint64(), ctypes.c_size_t()
        if self._driver.cuMemGetAddressRange_v2(ctypes.byref(base), ctypes.byref(size), start):
            self.close(start)
            raise CudaError("the size of the memory cannot be found out")
        return start, base.value + size.value - start

    def close(self, address: int) -> None:
        self._call(self._runtime.cudaIpcCloseMemHandle, address)

    def to_host(self, target: npt.NDArray[np.uint8], address: int) -> None:
        self._call(self._runtime.cudaMemcpy, target.ctypes.data, address, target.nbytes, _TO_HOST)

    def to_device(self, address: int, source: npt.NDArray[np.uint8]) -> None:
        self._call(self._runtime.cudaMemcpy, address, source.ctypes.data, source.nbytes, _TO_DEVICE)

    def _call(self, function: Callable[..., int], *arguments: Any) -> None:  # noqa: ANN401  # whatever C takes
        if code := function(*arguments):
            # Read, the error is also forgotten; else ONNX Runtime would find it in its own next call.
            self._runtime.cudaGetLastError()
            raise CudaError(self._runtime.cudaGetErrorString(code).decode())


@lru_cache(maxsize=1)
def find_cuda() -> Cuda | None:
    """CUDA, where its runtime is installed and sees a device."""
    for name in _RUNTIMES:
        try:
            runtime = ctypes.CDLL(name)
            count = ctypes.c_int()
            if runtime.cudaGetDeviceCount(ctypes.byref(count)) == 0 and count.value > 0:
                return Cuda(runtime, ctypes.CDLL("libcuda.so.1"), count.value)
        except OSError:
            continue
    return None


@dataclass(frozen=True)
class CudaRegion:
    """Device memory that a client exported, under the name that its requests use."""

    name: str
    device_id: int
    byte_size: int


class CudaMemory:
    """Owns the opened handles. Lives on the event loop.

    Everything but `close` raises `UnimplementedError` without permission, a CUDA runtime, or a device.
    """

    def __init__(self, allowed: bool, max_tensor_bytes: int = MAX_TENSOR_BYTES) -> None:
        self._allowed = allowed
        self._max_tensor_bytes = max_tensor_bytes
        self._regions: dict[str, CudaRegion] = {}
        self._addresses: dict[str, int] = {}

    def register(self, name: str, raw_handle: bytes, device_id: int, byte_size: int) -> None:
        """Opens a handle of cudaIpcGetMemHandle. Raises as `SharedMemory.register`."""
        cuda = self._cuda()
        check_new_name(name, self._regions)
        if len(raw_handle) != HANDLE_BYTES:
            raise InvalidFieldError.of("raw_handle", f"expected {HANDLE_BYTES} bytes; got {len(raw_handle)}")
        if not 0 <= device_id < cuda.devices:
            raise InvalidFieldError.of("device_id", f"expected a device below {cuda.devices}; got {device_id}")
        if byte_size < 1:
            raise InvalidFieldError.of("byte_size", f"expected at least 1; got {byte_size}")
        try:
            with cuda.device(device_id):
                address, available = cuda.open(raw_handle)
                if byte_size > available:
                    cuda.close(address)
                    raise InvalidFieldError.of(
                        "byte_size", f"expected at most the {available:,} bytes of the allocation; got {byte_size:,}"
                    )
        except CudaError as error:
            raise InvalidFieldError.of("raw_handle", f"it cannot be opened on device {device_id}: {error}") from error
        self._regions[name] = CudaRegion(name, device_id, byte_size)
        self._addresses[name] = address

    def unregister(self, name: str) -> None:
        """Closes a region; "" all of them. One that is not registered is no error."""
        self._cuda()
        for known in [name] if name else list(self._regions):
            if known in self._regions:
                self._forget(known)

    def status(self, name: str) -> Sequence[CudaRegion]:
        """The region of that name, for "" all. Raises `NotFoundError` for one that is not registered."""
        self._cuda()
        return [self._region(name)] if name else list(self._regions.values())

    def has(self, name: str) -> bool:
        """Whether a region of that name is registered here."""
        return name in self._regions

    def read(self, name: str, offset: int, byte_size: int) -> npt.NDArray[np.uint8]:
        """A copy on the host. Raises as `SharedMemory.read`."""
        cuda = self._cuda()
        region = self._region(name)
        check_bounds(name, region.byte_size, offset, byte_size, self._max_tensor_bytes)
        content = np.empty(byte_size, np.uint8)
        with _failing("read", name), cuda.device(region.device_id):
            cuda.to_host(content, self._addresses[name] + offset)
        return content

    def write(self, name: str, offset: int, byte_size: int, data: Data) -> None:
        """Writes `data` from the host. Raises as `SharedMemory.write`."""
        cuda = self._cuda()
        region = self._region(name)
        check_bounds(name, region.byte_size, offset, byte_size, self._max_tensor_bytes)
        source = np.frombuffer(byte_view(data), np.uint8)
        check_fits(name, byte_size, source.nbytes)
        with _failing("written", name), cuda.device(region.device_id):
            cuda.to_device(self._addresses[name] + offset, source)

    def close(self) -> None:
        """Closes every handle."""
        for name in list(self._regions):
            self._forget(name)

    def _forget(self, name: str) -> None:
        """A region whose exporter has died cannot be closed properly; it is forgotten all the same."""
        region, address = self._regions.pop(name), self._addresses.pop(name)
        cuda = self._cuda()
        with contextlib.suppress(CudaError), cuda.device(region.device_id):
            cuda.close(address)

    def _cuda(self) -> Cuda:
        require_allowed(self._allowed)
        cuda = find_cuda()
        if cuda is None:
            raise UnimplementedError(
                "There is no CUDA runtime or no GPU here, so no CUDA shared memory. Use system shared memory, or send "
                "the tensors in the request."
            )
        return cuda

    def _region(self, name: str) -> CudaRegion:
        region = self._regions.get(name)
        if region is None:
            raise unknown_region(name)
        return region


@contextlib.contextmanager
def _failing(verb: str, name: str) -> Iterator[None]:
    try:
        yield
    except CudaError as error:
        raise InvalidFieldError.of(
            REGION, f"{name!r} cannot be {verb}: {error}. Has the program that exported it ended?"
        ) from error
