"""Uploads whose clients leave at the worst moment."""

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from penstock.rpc.errors import ConflictError
from penstock.storage.blobs import BlobRef, BlobStore, digest_of

DATA = b"half of what was announced"
REF = BlobRef(digest_of(DATA + DATA), 2 * len(DATA))


def open_files(folder: Path) -> list[Path]:
    links = [link for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return [link for link in links if link.readlink().is_relative_to(folder)]


async def resumed(store: BlobStore) -> bool:
    """Sends the other half; not while the first stream holds the upload."""
    try:
        async with store.upload(REF, len(DATA)) as upload:
            await upload.append(DATA)
            return await upload.finish()
    except ConflictError:
        return False


async def test_an_upload_cancelled_twice_leaves_no_open_file(tmp_path: Path) -> None:
    """A broken stream ends, which begins the closing; then its call is cancelled, which must not end the closing."""
    store = BlobStore(tmp_path)
    free = threading.Event()
    sent = asyncio.Event()

    async def stream() -> None:
        async with store.upload(REF, 0) as upload:
            await upload.append(DATA)
            # From now on every thread is busy, so the closing has to wait for one.
            asyncio.get_running_loop().run_in_executor(None, free.wait)
            sent.set()
            await asyncio.Event().wait()

    with ThreadPoolExecutor(max_workers=1) as threads:
        asyncio.get_running_loop().set_default_executor(threads)
        task = asyncio.create_task(stream())
        await sent.wait()
        for _ in range(3):
            task.cancel()
            await asyncio.sleep(0)
        await asyncio.wait({task})
        free.set()
        async with asyncio.timeout(10):
            while not await resumed(store):  # noqa: ASYNC110  # a store says nothing when an upload is free
                await asyncio.sleep(0.01)
        assert open_files(tmp_path) == []
