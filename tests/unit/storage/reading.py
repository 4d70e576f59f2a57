"""Reading blobs in tests."""

from penstock.storage.blobs import BlobStore


async def whole(store: BlobStore, digest: str) -> bytes:
    """All bytes of a blob, checked."""
    return b"".join([chunk async for chunk in store.read(digest)])
