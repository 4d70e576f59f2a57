"""Blobs are deleted only between changes, so none is taken up while it goes."""

import asyncio
from pathlib import Path

import pytest

from penstock.api.registry.v1 import model_pb2
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.registry import models, versions
from penstock.registry.app import MIGRATIONS
from penstock.registry.store import Store
from penstock.rpc.errors import NotFoundError
from penstock.storage.blobs import BlobStore
from penstock.storage.database import opened_database, sqlite_url


async def test_a_blob_that_a_change_takes_up_stays(tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path)
    graph = await blobs.write(b"graph")
    version = model_pb2.Version(model="m", files={"model.onnx": Blob(digest=graph.digest, size_bytes=graph.size_bytes)})
    async with opened_database(sqlite_url(tmp_path / "registry.db"), MIGRATIONS) as database:
        store = Store(database, lambda: None)
        async with store.change() as change:
            await models.create(change, "m", "")

        async with store.change() as change:
            await versions.create(change, blobs, version, "")
            discarding = asyncio.create_task(versions.discard_unused(store, blobs, {graph.digest}))
            _, waiting = await asyncio.wait([discarding], timeout=0.3)
            assert waiting
        await discarding
        assert await blobs.size(graph.digest) == graph.size_bytes

        async with store.change() as change:
            unused = await versions.remove(change, "m", 1)
        await versions.discard_unused(store, blobs, unused)
        assert await blobs.size(graph.digest) is None
        with pytest.raises(NotFoundError, match=graph.digest):
            async with store.change() as change:
                await versions.create(change, blobs, version, "")
