"""The blob store under a full disk and SIGKILL, in processes of their own."""

import asyncio
import errno
import os
import signal
import sys
from pathlib import Path

import pytest
from tests.unit.storage.reading import whole

from penstock.rpc.errors import StorageFullError
from penstock.storage.blobs import BlobRef, BlobStore, digest_of

DATA = bytes(range(251)) * 8000
REF = BlobRef(digest_of(DATA), len(DATA))
LIMIT = 300_000

FULL_DISK = f"""
import asyncio, resource, sys
from pathlib import Path
from penstock.rpc.errors import StorageFullError
from penstock.storage.blobs import BlobRef, BlobStore, digest_of

data = bytes(range(251)) * 8000
ref = BlobRef(digest_of(data), len(data))

async def main():
    store = BlobStore(Path(sys.argv[1]))
    await store.write(b"small")
    resource.setrlimit(resource.RLIMIT_FSIZE, ({LIMIT}, {LIMIT}))
    try:
        if sys.argv[2] == "stream":
            async with store.upload(ref, 0) as upload:
                for start in range(0, len(data), 100_001):
                    await upload.append(data[start:start + 100_001])
        else:
            await store.write(data)
    except StorageFullError as error:
        print(await store.committed(ref.digest), await store.size(ref.digest), error)
    assert [chunk async for chunk in store.read(digest_of(b"small"))] == [b"small"]

asyncio.run(main())
"""

WRITER = """
import asyncio, sys
from pathlib import Path
from penstock.storage.blobs import BlobRef, BlobStore, digest_of

data = bytes(range(251)) * 8000
ref = BlobRef(digest_of(data), len(data))

async def main():
    store = BlobStore(Path(sys.argv[1]))
    start = await store.committed(ref.digest)
    async with store.upload(ref, start) as upload:
        for begin in range(start, len(data), 5000):
            await upload.append(data[begin:begin + 5000])
            print(await store.committed(ref.digest), flush=True)
        await upload.finish()
    print("done", flush=True)

asyncio.run(main())
"""


async def output(program: str, *arguments: str) -> str:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, *arguments, stdout=asyncio.subprocess.PIPE
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


@pytest.mark.parametrize(("how", "kept"), [("stream", LIMIT), ("whole", 0)])
async def test_a_full_disk_keeps_what_was_committed(how: str, kept: int, tmp_path: Path) -> None:
    committed, size, message = (await output(FULL_DISK, str(tmp_path), how)).split(" ", 2)
    assert (int(committed), size) == (kept, "None")
    assert message.startswith("The disk is full")
    assert REF.digest in message
    store = BlobStore(tmp_path)
    if how == "whole":
        assert list((tmp_path / "uploads").iterdir()) == []
    async with store.upload(REF, kept) as upload:
        await upload.append(DATA[kept:])
        assert await upload.finish()
    assert await whole(store, REF.digest) == DATA


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG], ids=errno.errorcode.get)
async def test_a_disk_that_fills_while_publishing_keeps_the_staged_bytes(
    error: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(tmp_path)

    def full(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patched:
        # A folder that cannot be made or renamed into for want of space cannot be had on a real disk at will.
        patched.setattr(Path, "replace", full)
        async with store.upload(REF, 0) as upload:
            await upload.append(DATA)
            with pytest.raises(StorageFullError, match="then resume"):
                await upload.finish()
    assert await store.size(REF.digest) is None
    assert await store.committed(REF.digest) == len(DATA)
    async with store.upload(REF, len(DATA)) as upload:
        assert await upload.finish()
    assert await whole(store, REF.digest) == DATA


async def test_a_killed_writer_loses_no_committed_byte_and_shows_no_part(tmp_path: Path) -> None:
    for kill_after in (1, 40, 100):
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", WRITER, str(tmp_path), stdout=asyncio.subprocess.PIPE
        )
        assert process.stdout is not None
        told = 0
        for _ in range(kill_after):
            told = int(await process.stdout.readline())
        process.send_signal(signal.SIGKILL)
        await process.wait()
        store = BlobStore(tmp_path)
        committed = await store.committed(REF.digest)
        assert told <= committed < len(DATA)
        assert await store.size(REF.digest) is None
        assert store.staged_path(REF.digest).read_bytes() == DATA[:committed]
    assert (await output(WRITER, str(tmp_path))).endswith("done\n")
    assert await whole(BlobStore(tmp_path), REF.digest) == DATA


async def test_a_crash_between_publishing_and_forgetting_the_staged_bytes_is_harmless(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    await store.write(DATA)
    store.staged_path(REF.digest).write_bytes(DATA[:100])
    again = BlobStore(tmp_path)
    assert await again.committed(REF.digest) == len(DATA)
    async with again.upload(REF, len(DATA)) as upload:
        assert await upload.finish()
    assert await whole(again, REF.digest) == DATA
