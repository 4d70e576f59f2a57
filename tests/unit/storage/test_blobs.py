"""The blob store: what is visible has its digest; what was committed stays."""

import asyncio
import os
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.unit.storage.reading import whole

from penstock.rpc import errors
from penstock.storage import blobs as module
from penstock.storage.blobs import ABANDONED_AFTER_S, CHUNK_BYTES, BlobRef, BlobStore, digest_of

DATA = bytes(range(256)) * 41
REF = BlobRef(digest_of(DATA), len(DATA))


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def visible_file(folder: Path, digest: str = REF.digest) -> Path:
    hexadecimal = digest.removeprefix("sha256:")
    return folder / "blobs" / "sha256" / hexadecimal[:2] / hexadecimal


async def send(store: BlobStore, ref: BlobRef, offset: int, data: bytes, finish: bool = True) -> bool:
    async with store.upload(ref, offset) as upload:
        await upload.append(data)
        return await upload.finish() if finish else False


@pytest.mark.parametrize("data", [b"", b"x", DATA, bytes(3 * CHUNK_BYTES + 1)], ids=len)
async def test_round_trip(store: BlobStore, data: bytes) -> None:
    ref = BlobRef(digest_of(data), len(data))
    assert await store.size(ref.digest) is None
    assert await send(store, ref, 0, data)
    assert await store.size(ref.digest) == len(data)
    chunks = [chunk async for chunk in store.read(ref.digest)]
    assert b"".join(chunks) == data
    assert all(0 < len(chunk) <= CHUNK_BYTES for chunk in chunks)
    middle = len(data) // 2
    assert b"".join([chunk async for chunk in store.read(ref.digest, middle)]) == data[middle:]


@given(streams=st.lists(st.lists(st.binary(max_size=40), max_size=4), min_size=1, max_size=5))
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
async def test_any_chunking_and_any_resuming_give_the_same_blob(tmp_path: Path, streams: list[list[bytes]]) -> None:
    data = b"".join(chunk for chunks in streams for chunk in chunks)
    ref = BlobRef(digest_of(data), len(data))
    await BlobStore(tmp_path).delete(ref.digest)
    sent = 0
    for chunks in streams:
        # A new store each time: what was committed is on the disk, not in memory.
        store = BlobStore(tmp_path)
        assert await store.committed(ref.digest) == sent
        async with store.upload(ref, sent) as upload:
            for chunk in chunks:
                await upload.append(chunk)
                sent += len(chunk)
            assert await upload.finish() == (sent == len(data))
        assert await store.size(ref.digest) == (sent if sent == len(data) else None)
    assert await whole(BlobStore(tmp_path), ref.digest) == data


async def test_a_cut_stream_is_resumed_where_it_stood(store: BlobStore, tmp_path: Path) -> None:
    async def cut() -> None:
        async with store.upload(REF, 0) as upload:
            await upload.append(DATA[:1000])
            raise ConnectionError

    with pytest.raises(ConnectionError):
        await cut()
    assert await store.size(REF.digest) is None
    again = BlobStore(tmp_path)
    assert await again.committed(REF.digest) == 1000
    assert await send(again, REF, 1000, DATA[1000:])
    assert await whole(again, REF.digest) == DATA
    assert await again.committed(REF.digest) == len(DATA)
    assert list((tmp_path / "uploads").iterdir()) == []


@pytest.mark.parametrize("offset", [0, 999, 1001, len(DATA)])
async def test_a_wrong_offset_is_told_the_right_one(store: BlobStore, offset: int) -> None:
    await send(store, REF, 0, DATA[:1000], finish=False)
    with pytest.raises(errors.WrongOffsetError, match="Resume at 1000") as caught:
        await send(store, REF, offset, b"")
    assert caught.value.metadata == {"committed_size_bytes": "1000"}
    assert await store.committed(REF.digest) == 1000


async def test_bytes_of_another_digest_are_discarded(store: BlobStore) -> None:
    with pytest.raises(errors.InvalidFieldError, match=digest_of(bytes(len(DATA)))):
        await send(store, REF, 0, bytes(len(DATA)))
    assert await store.committed(REF.digest) == 0
    assert await send(store, REF, 0, DATA)


async def test_more_bytes_than_announced_are_refused(store: BlobStore) -> None:
    with pytest.raises(errors.InvalidFieldError, match=f"announced {len(DATA)} bytes; {len(DATA) + 1} came"):
        await send(store, REF, 0, DATA + b"!")
    assert await store.size(REF.digest) is None


async def test_a_staged_file_longer_than_the_blob_is_begun_again(store: BlobStore) -> None:
    await send(store, BlobRef(REF.digest, 1 << 20), 0, bytes(len(DATA) + 5), finish=False)
    with pytest.raises(errors.WrongOffsetError, match="Resume at 0"):
        await send(store, REF, len(DATA) + 5, b"")
    assert await send(store, REF, 0, DATA)
    assert await whole(store, REF.digest) == DATA


async def test_one_stream_at_a_time_writes_a_blob(store: BlobStore) -> None:
    async with store.upload(REF, 0) as upload:
        await upload.append(DATA[:10])
        with pytest.raises(errors.ConflictError, match=REF.digest):
            await send(store, REF, 10, DATA[10:])
        await upload.append(DATA[10:])
        assert await upload.finish()
    assert await whole(store, REF.digest) == DATA


async def test_a_visible_blob_is_complete_at_once(store: BlobStore) -> None:
    await store.write(DATA)
    async with store.upload(REF, len(DATA)) as upload:
        assert await upload.finish()


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 0])
async def test_a_visible_blob_is_not_taken_for_one_of_another_size(store: BlobStore, size: int) -> None:
    await store.write(DATA)
    with pytest.raises(errors.InvalidFieldError, match=f"has {len(DATA)} bytes, not {size}"):
        await send(store, BlobRef(REF.digest, size), len(DATA), b"")
    assert await whole(store, REF.digest) == DATA


async def test_bytes_at_hand_are_stored_beside_a_stream_of_the_same(store: BlobStore, tmp_path: Path) -> None:
    async with store.upload(REF, 0) as upload:
        await upload.append(b"not what was announced")
        results = await asyncio.gather(*(store.write(DATA) for _ in range(8)))
    assert results == [REF] * 8
    assert await whole(store, REF.digest) == DATA
    assert [path.name for path in (tmp_path / "uploads").iterdir()] == [store.staged_path(REF.digest).name]


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "extend"])
async def test_a_corrupted_blob_is_found_and_can_be_written_again(
    store: BlobStore, tmp_path: Path, damage: str
) -> None:
    await store.write(DATA)
    file = visible_file(tmp_path)
    file.write_bytes({"flip": b"!" + DATA[1:], "truncate": DATA[:-1], "empty": b"", "extend": DATA + b"!"}[damage])
    for _ in range(2):
        with pytest.raises(errors.CorruptedError, match=REF.digest):
            await whole(store, REF.digest)
    assert await store.size(REF.digest) is None
    assert await store.committed(REF.digest) == 0
    assert await send(store, REF, 0, DATA)
    assert await whole(store, REF.digest) == DATA
    assert await store.size(REF.digest) == len(DATA)


async def test_a_truncated_blob_nobody_has_read_yet_can_be_written_again(store: BlobStore, tmp_path: Path) -> None:
    await store.write(DATA)
    visible_file(tmp_path).write_bytes(DATA[:-1])
    assert await send(store, REF, 0, DATA)
    assert await whole(store, REF.digest) == DATA


async def test_a_restored_blob_is_visible_again(store: BlobStore, tmp_path: Path) -> None:
    await store.write(DATA)
    visible_file(tmp_path).write_bytes(b"!")
    with pytest.raises(errors.CorruptedError):
        await whole(store, REF.digest)
    visible_file(tmp_path).write_bytes(DATA)
    assert await whole(store, REF.digest) == DATA
    assert await store.size(REF.digest) == len(DATA)


async def test_reading_what_is_not_there(store: BlobStore) -> None:
    with pytest.raises(errors.NotFoundError, match=REF.digest):
        await whole(store, REF.digest)
    await store.write(DATA)
    with pytest.raises(errors.WrongOffsetError, match=f"has {len(DATA)} bytes"):
        await anext(store.read(REF.digest, len(DATA) + 1))
    assert [chunk async for chunk in store.read(REF.digest, len(DATA))] == []
    await store.delete(REF.digest)
    await store.delete(REF.digest)
    with pytest.raises(errors.NotFoundError):
        await whole(store, REF.digest)


async def test_a_blob_removed_while_it_is_read(
    store: BlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(4 * CHUNK_BYTES)
    ref = await store.write(data)
    reading = store.read(ref.digest)
    first = await anext(reading)
    await store.delete(ref.digest)
    # The open file stays readable.
    assert first + b"".join([chunk async for chunk in reading]) == data

    ref = await store.write(data)
    real = BlobStore._stored_size

    async def removed_after_it_was_looked_up(self: BlobStore, digest: str) -> int | None:
        size = await real(self, digest)
        visible_file(tmp_path, digest).unlink()
        return size

    monkeypatch.setattr(BlobStore, "_stored_size", removed_after_it_was_looked_up)
    with pytest.raises(errors.NotFoundError, match=ref.digest):
        await whole(store, ref.digest)


async def test_a_cancelled_write_ends_before_its_file_is_closed(
    store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, began = os.write, asyncio.Event()
    loop = asyncio.get_running_loop()

    def slow(descriptor: int, data: bytes) -> int:
        # One byte at a time, so that the stream is cancelled in the middle of the chunk.
        loop.call_soon_threadsafe(began.set)
        time.sleep(0.002)
        return real(descriptor, data[:1])

    monkeypatch.setattr(module.os, "write", slow)

    async def stream() -> None:
        async with store.upload(REF, 0) as upload:
            await upload.append(DATA[:50])

    task = asyncio.create_task(stream())
    await began.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    committed = await store.committed(REF.digest)
    assert store.staged_path(REF.digest).read_bytes() == DATA[:committed]
    monkeypatch.undo()
    assert await send(store, REF, committed, DATA[committed:])


async def test_abandoned_uploads_are_discarded(store: BlobStore, tmp_path: Path) -> None:
    other = BlobRef(digest_of(b"other"), 5)
    await send(store, REF, 0, DATA[:10], finish=False)
    await send(store, other, 0, b"oth", finish=False)
    long_ago = time.time() - ABANDONED_AFTER_S - 1
    os.utime(store.staged_path(REF.digest), (long_ago, long_ago))
    again = BlobStore(tmp_path)
    assert await again.committed(REF.digest) == 0
    assert await again.committed(other.digest) == 3


@pytest.mark.parametrize(
    "digest", ["", "sha256:", "sha256:../../../etc/passwd", "sha256:" + "A" * 64, "md5:" + "0" * 64]
)
async def test_nothing_but_a_digest_becomes_a_path(store: BlobStore, digest: str) -> None:
    with pytest.raises(ValueError, match="expected a digest"):
        await store.size(digest)
    with pytest.raises(ValueError, match="expected a digest"):
        store.staged_path(digest)


@pytest.fixture
def remote(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path, "memory:///")


async def test_a_store_at_a_url_keeps_only_uploads_in_the_folder(remote: BlobStore, tmp_path: Path) -> None:
    await send(remote, REF, 0, DATA[:10], finish=False)
    assert await send(remote, REF, 10, DATA[10:])
    assert await whole(remote, REF.digest) == DATA
    other = await remote.write(b"other")
    assert await whole(remote, other.digest) == b"other"
    assert [path.name for path in tmp_path.rglob("*")] == ["uploads"]
    await remote.delete(REF.digest)
    await remote.delete(REF.digest)
    assert await remote.size(REF.digest) is None
