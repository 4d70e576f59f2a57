"""Shared memory: real objects, hostile keys and numbers, and owners who truncate what they registered."""

import os
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.inference import cuda_memory
from penstock.inference.cuda_memory import CudaMemory
from penstock.inference.shared_memory import MAX_REGIONS, Region, SharedMemory
from penstock.rpc.errors import (
    ExistsError,
    InvalidFieldError,
    LimitExceededError,
    NotFoundError,
    PenstockError,
    UnimplementedError,
)

SHM = Path("/dev/shm")
CONTENT = bytes(range(256)) * 16

pytestmark = pytest.mark.skipif(not SHM.is_dir(), reason="POSIX shared memory is files only on Linux")


@pytest.fixture
def new_object() -> Iterator[Callable[..., str]]:
    """Makes shared memory objects, by default with `CONTENT`; gives their names."""
    made: list[Path] = []

    def make(content: bytes = CONTENT) -> str:
        path = SHM / f"penstock-test-{uuid.uuid4().hex}"
        path.write_bytes(content)
        made.append(path)
        return path.name

    yield make
    for path in made:
        path.unlink(missing_ok=True)


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    owner = SharedMemory(allowed=True)
    yield owner
    owner.close()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.parametrize("slash", ["", "/"])
def test_a_region_is_read_and_written(memory: SharedMemory, new_object: Callable[..., str], slash: str) -> None:
    name = new_object()
    memory.register("r", slash + name, 256, 1024)
    assert memory.status("r") == memory.status("") == [Region("r", slash + name, 256, 1024)]
    copy = memory.read("r", 10, 20)
    assert copy.tobytes() == CONTENT[266:286]
    memory.write("r", 10, 20, b"written")
    assert (SHM / name).read_bytes() == CONTENT[:266] + b"written" + CONTENT[273:]
    assert copy.tobytes() == CONTENT[266:286], "what was read belongs to the request, not to the client"
    memory.write("r", 1016, 8, np.array([1.5, 2.5], np.float32))
    assert memory.read("r", 1016, 8).view(np.float32).tolist() == [1.5, 2.5]


def test_tritonclients_regions_can_be_read(memory: SharedMemory) -> None:
    shm = pytest.importorskip("tritonclient.utils.shared_memory", reason="tritonclient is not installed")
    key = f"/penstock-test-{uuid.uuid4().hex}"
    handle = shm.create_shared_memory_region("r", key, 64)
    try:
        shm.set_shared_memory_region(handle, [np.arange(8, dtype=np.float32)])
        memory.register("r", key, 0, 64)
        assert memory.read("r", 0, 32).view(np.float32).tolist() == list(range(8))
        memory.write("r", 32, 32, np.arange(8, dtype=np.int32))
        assert shm.get_contents_as_numpy(handle, np.int32, [8], offset=32).tolist() == list(range(8))
    finally:
        shm.destroy_shared_memory_region(handle)


def test_a_name_is_taken_until_it_is_unregistered(memory: SharedMemory, new_object: Callable[..., str]) -> None:
    key = new_object()
    memory.register("r", key, 0, 8)
    memory.register("s", key, 8, 8)
    with pytest.raises(ExistsError, match="Unregister it first"):
        memory.register("r", key, 0, 8)
    memory.unregister("r")
    memory.unregister("r")
    assert [region.name for region in memory.status("")] == ["s"]
    with pytest.raises(NotFoundError):
        memory.status("r")
    with pytest.raises(NotFoundError):
        memory.read("r", 0, 1)
    with pytest.raises(NotFoundError):
        memory.write("r", 0, 1, b"x")
    memory.register("r", key, 0, 8)
    memory.unregister("")
    assert memory.status("") == []


@pytest.mark.parametrize(
    "key",
    [
        *("", "/", "..", "/..", "../etc/passwd", "/dev/shm/x", "a/b", "//a", ".hidden", "sem.x", "/sem.x", "a\0b"),
        *("x" * 256, "é" * 128, "penstock-no-such-object", "\ud800", "envoy_shared_memory_0"),
    ],
)
def test_a_key_never_becomes_a_path(memory: SharedMemory, key: str) -> None:
    before = descriptors()
    with pytest.raises(InvalidFieldError, match=r"^key: "):
        memory.register("r", key, 0, 1)
    assert descriptors() == before


@pytest.mark.parametrize("make", [lambda p: p.symlink_to("/etc/passwd"), os.mkfifo, Path.mkdir])
def test_only_plain_objects_are_opened(memory: SharedMemory, make: Callable[[Path], None]) -> None:
    path = SHM / f"penstock-test-{uuid.uuid4().hex}"
    make(path)
    before = descriptors()
    try:
        with pytest.raises(InvalidFieldError, match=r"^key: "):
            memory.register("r", path.name, 0, 1)
        assert descriptors() == before
    finally:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()


@pytest.mark.parametrize(
    ("offset", "byte_size"),
    [(0, -1), (-1, 1), (0, 4097), (4096, 1), (4090, 7), (2**63, 1), (0, 2**63), (2**64 - 1, 2), (-(2**63), 1)],
)
def test_windows_lie_inside(memory: SharedMemory, new_object: Callable[..., str], offset: int, byte_size: int) -> None:
    key = new_object()
    before = descriptors()
    with pytest.raises(InvalidFieldError):
        memory.register("r", key, offset, byte_size)
    assert descriptors() == before
    memory.register("r", key, 0, 4096)
    with pytest.raises(InvalidFieldError):
        memory.read("r", offset, byte_size)
    with pytest.raises(InvalidFieldError):
        memory.write("r", offset, byte_size, b"x")
    assert (SHM / key).read_bytes() == CONTENT


@given(start=st.integers(0, 4000), size=st.integers(1, 96), offset=st.integers(-8, 128), byte_size=st.integers(-8, 128))
def test_nothing_outside_the_registered_window_is_reached(start: int, size: int, offset: int, byte_size: int) -> None:
    path = SHM / f"penstock-test-{uuid.uuid4().hex}"
    path.write_bytes(CONTENT)
    memory = SharedMemory(allowed=True)
    try:
        memory.register("r", path.name, start, size)
        if offset >= 0 and byte_size >= 0 and offset + byte_size <= size:
            assert memory.read("r", offset, byte_size).tobytes() == CONTENT[start + offset :][:byte_size]
        else:
            with pytest.raises(InvalidFieldError):
                memory.read("r", offset, byte_size)
    finally:
        memory.close()
        path.unlink()


def test_a_tensor_of_no_bytes_may_lie_in_a_region_and_a_region_of_none_is_refused(
    memory: SharedMemory, new_object: Callable[..., str]
) -> None:
    key = new_object()
    with pytest.raises(InvalidFieldError, match="byte_size: expected at least 1; got 0"):
        memory.register("r", key, 0, 0)
    memory.register("r", key, 0, 4096)
    for offset in (0, 4096):
        assert memory.read("r", offset, 0).tobytes() == b""
        memory.write("r", offset, 0, b"")
    with pytest.raises(InvalidFieldError, match="room for 1 bytes"):
        memory.write("r", 0, 0, b"x")
    assert (SHM / key).read_bytes() == CONTENT


def test_an_output_must_fit(memory: SharedMemory, new_object: Callable[..., str]) -> None:
    key = new_object()
    memory.register("r", key, 0, 4096)
    with pytest.raises(InvalidFieldError, match="room for 5 bytes"):
        memory.write("r", 0, 4, b"12345")
    assert (SHM / key).read_bytes() == CONTENT


@pytest.mark.parametrize("left", [0, 100])
def test_a_truncated_region_is_an_error_and_no_crash(
    memory: SharedMemory, new_object: Callable[..., str], left: int
) -> None:
    key = new_object()
    memory.register("r", key, 0, 4096)
    os.truncate(SHM / key, left)
    with pytest.raises(InvalidFieldError, match="has become smaller"):
        memory.read("r", 0, 4096)
    with pytest.raises(InvalidFieldError, match="has become smaller"):
        memory.write("r", 0, 4096, bytes(4096))
    assert (SHM / key).stat().st_size == left
    # An unlinked object lives on as long as somebody has it open.
    (SHM / key).write_bytes(CONTENT)
    (SHM / key).unlink()
    assert memory.read("r", 0, 4096).tobytes() == CONTENT


def test_sparse_regions_do_not_fill_the_servers_memory(memory: SharedMemory, new_object: Callable[..., str]) -> None:
    key = new_object(b"")
    os.truncate(SHM / key, 2**40)
    memory.register("r", key, 0, 2**40)
    with pytest.raises(LimitExceededError):
        memory.read("r", 0, 2**40)
    assert memory.read("r", 2**40 - 8, 8).tobytes() == bytes(8)


def test_regions_are_bounded_and_closing_gives_every_descriptor_back(new_object: Callable[..., str]) -> None:
    key = new_object()
    before = descriptors()
    memory = SharedMemory(allowed=True)
    # The process may not be allowed as many files as there may be regions.
    for number in range(200):
        memory.register(str(number), key, 0, 8)
    assert descriptors() == before + 200
    memory.unregister("0")
    memory.register("0", key, 0, 8)
    memory._regions |= {f"more {number}": Region("", "", 0, 1) for number in range(MAX_REGIONS - 200)}
    with pytest.raises(LimitExceededError):
        memory.register("one more", key, 0, 8)
    memory.close()
    memory.close()
    assert descriptors() == before
    assert memory.status("") == []


@pytest.mark.parametrize("name", ["", "x" * 257])
def test_names_are_bounded(memory: SharedMemory, new_object: Callable[..., str], name: str) -> None:
    with pytest.raises(InvalidFieldError, match=r"^name: "):
        memory.register(name, new_object(), 0, 8)


def test_it_is_off_unless_it_is_allowed(new_object: Callable[..., str]) -> None:
    system, cuda = SharedMemory(allowed=False), CudaMemory(allowed=False)
    calls: list[Callable[[], object]] = [
        lambda: system.register("r", new_object(), 0, 8),
        lambda: cuda.register("r", bytes(64), 0, 8),
        *(lambda m=m: m.unregister("") for m in (system, cuda)),
        *(lambda m=m: m.status("") for m in (system, cuda)),
        *(lambda m=m: m.read("r", 0, 8) for m in (system, cuda)),
        *(lambda m=m: m.write("r", 0, 8, b"x") for m in (system, cuda)),
    ]
    for call in calls:
        with pytest.raises(UnimplementedError, match="--allow-client-shm"):
            call()
    system.close()
    cuda.close()


@pytest.mark.skipif(cuda_memory.find_cuda() is not None, reason="there is a GPU here")
def test_without_a_gpu_cuda_memory_says_so() -> None:
    memory = CudaMemory(allowed=True)
    for call in (
        lambda: memory.register("r", bytes(64), 0, 8),
        lambda: memory.unregister(""),
        lambda: memory.status(""),
        lambda: memory.read("r", 0, 8),
    ):
        with pytest.raises(UnimplementedError, match="no GPU here"):
            call()
    memory.close()


EXPORTER = """
import ctypes, sys
cuda = ctypes.CDLL(sys.argv[1])
address, handle = ctypes.c_void_p(), ctypes.create_string_buffer(64)
assert cuda.cudaMalloc(ctypes.byref(address), ctypes.c_size_t(4096)) == 0
content = bytes(range(256)) * 16
assert cuda.cudaMemcpy(address, content, ctypes.c_size_t(4096), 1) == 0
assert cuda.cudaIpcGetMemHandle(handle, address) == 0
print(handle.raw.hex(), flush=True)
sys.stdin.read()
"""


@pytest.mark.skipif(cuda_memory.find_cuda() is None, reason="it needs a GPU and the CUDA runtime")
def test_device_memory_of_another_process_is_read_and_written() -> None:
    import subprocess
    import sys

    cuda = cuda_memory.find_cuda()
    assert cuda is not None
    arguments = [sys.executable, "-c", EXPORTER, cuda._runtime._name]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as exporter:
        assert exporter.stdin is not None
        assert exporter.stdout is not None
        handle = bytes.fromhex(exporter.stdout.readline())
        memory = CudaMemory(allowed=True)
        with pytest.raises(InvalidFieldError, match="of the allocation"):
            memory.register("r", handle, 0, 2**40)
        memory.register("r", handle, 0, 4096)
        assert memory.read("r", 16, 32).tobytes() == CONTENT[16:48]
        memory.write("r", 16, 32, b"written")
        assert memory.read("r", 16, 7).tobytes() == b"written"
        with pytest.raises(InvalidFieldError):
            memory.read("r", 4090, 7)
        memory.close()
        exporter.stdin.close()


@pytest.mark.skipif(cuda_memory.find_cuda() is None, reason="it needs a GPU and the CUDA runtime")
@pytest.mark.parametrize(("handle", "device"), [(bytes(63), 0), (bytes(64), -1), (bytes(64), 999), (b"\xff" * 64, 0)])
def test_wrong_handles_are_refused(handle: bytes, device: int) -> None:
    with pytest.raises(PenstockError):
        CudaMemory(allowed=True).register("r", handle, device, 8)
