"""ArtifactService through the wire: what its contract promises."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest
from tests.integration.rpc.probe import details, served, stub

from penstock.api.registry.v1 import artifact_service_pb2 as pb
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.storage.artifacts import MAX_BLOB_BYTES, ArtifactServicer
from penstock.storage.blobs import CHUNK_BYTES, BlobStore, digest_of

DATA = bytes(range(256)) * 5000
BLOB = Blob(digest=digest_of(DATA), size_bytes=len(DATA))


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


@pytest.fixture
async def channel(store: BlobStore) -> AsyncIterator[grpc.aio.Channel]:
    async with served(ArtifactServicer(store).service()) as connected:
        yield connected


def header(blob: Blob = BLOB, offset: int = 0) -> pb.WriteRequest:
    return pb.WriteRequest(header=pb.WriteHeader(blob=blob, offset=offset))


def chunks(data: bytes, size: int = 300_000) -> Iterator[pb.WriteRequest]:
    for start in range(0, len(data), size):
        yield pb.WriteRequest(chunk=data[start : start + size])


async def committed(channel: grpc.aio.Channel) -> tuple[int, bool]:
    answer = await stub(channel).QueryWriteStatus(pb.QueryWriteStatusRequest(digest=BLOB.digest))
    return answer.committed_size_bytes, answer.complete


async def code_of_write(channel: grpc.aio.Channel, offset: int) -> grpc.StatusCode:
    return await stub(channel).Write(iter([header(offset=offset), *chunks(DATA[offset:])])).code()


async def read(channel: grpc.aio.Channel, offset: int = 0) -> bytes:
    request = pb.ReadRequest(digest=BLOB.digest, offset=offset)
    return b"".join([response.data async for response in stub(channel).Read(request)])


async def test_round_trip_and_writing_again(channel: grpc.aio.Channel) -> None:
    assert await committed(channel) == (0, False)
    answer = await stub(channel).Write(iter([header(), *chunks(DATA)]))
    assert answer.blob == BLOB
    assert await committed(channel) == (len(DATA), True)
    assert await read(channel) == DATA
    assert await read(channel, len(DATA) - 3) == DATA[-3:]
    assert await read(channel, len(DATA)) == b""
    assert (await stub(channel).Write(iter([header(), *chunks(DATA)]))).blob == BLOB


async def test_an_empty_blob(channel: grpc.aio.Channel) -> None:
    empty = Blob(digest=digest_of(b""), size_bytes=0)
    assert (await stub(channel).Write(iter([header(empty)]))).blob == empty
    assert [r async for r in stub(channel).Read(pb.ReadRequest(digest=empty.digest))] == []


async def test_a_client_that_left_resumes(channel: grpc.aio.Channel) -> None:
    call = stub(channel).Write()
    await call.write(header())
    await call.write(pb.WriteRequest(chunk=DATA[:1000]))
    async with asyncio.timeout(5):
        while await committed(channel) != (1000, False):  # noqa: ASYNC110  # a server has no event
            await asyncio.sleep(0.01)
    # The header alone: grpc.aio makes INTERNAL of an answer that overtakes what is still being sent.
    second = stub(channel).Write()
    await second.write(header(offset=1000))
    assert await second.code() is grpc.StatusCode.ABORTED
    call.cancel()
    async with asyncio.timeout(5):
        # Refused until the server has heard of the cancellation.
        while await code_of_write(channel, 1000) is not grpc.StatusCode.OK:
            pass
    assert await read(channel) == DATA


@pytest.mark.parametrize(
    ("requests", "code", "field"),
    [
        ([], "INVALID_ARGUMENT", "header"),
        ([pb.WriteRequest(chunk=b"x")], "INVALID_ARGUMENT", "header"),
        ([header(Blob(digest="sha256:no", size_bytes=1))], "INVALID_ARGUMENT", "header.blob.digest"),
        ([header(Blob(digest=BLOB.digest, size_bytes=-1))], "INVALID_ARGUMENT", "header.blob.size_bytes"),
        (
            [header(Blob(digest=BLOB.digest, size_bytes=MAX_BLOB_BYTES + 1))],
            "INVALID_ARGUMENT",
            "header.blob.size_bytes",
        ),
        ([header(offset=-1)], "INVALID_ARGUMENT", "header.offset"),
        ([header(offset=5)], "OUT_OF_RANGE", None),
        ([header(), header()], "INVALID_ARGUMENT", "chunk"),
        ([header(), pb.WriteRequest(chunk=b"")], "INVALID_ARGUMENT", "chunk"),
        ([header(), pb.WriteRequest(chunk=bytes(CHUNK_BYTES + 1))], "INVALID_ARGUMENT", "chunk"),
        ([header(), pb.WriteRequest(chunk=DATA[:10])], "INVALID_ARGUMENT", "chunk"),
        ([header(), *chunks(DATA + b"!")], "INVALID_ARGUMENT", "chunk"),
        ([header(), *chunks(bytes(len(DATA)))], "INVALID_ARGUMENT", "header"),
    ],
)
async def test_wrong_uploads(
    channel: grpc.aio.Channel, requests: list[pb.WriteRequest], code: str, field: str | None
) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(channel).Write(iter(requests))
    assert caught.value.code() is grpc.StatusCode[code]
    _, bad = details(caught.value)
    assert [violation.field for violation in bad.field_violations] == ([field] if field else [])
    assert not (await committed(channel))[1]


async def test_a_visible_blob_is_not_acknowledged_with_another_size(channel: grpc.aio.Channel) -> None:
    await stub(channel).Write(iter([header(), *chunks(DATA)]))
    longer = Blob(digest=BLOB.digest, size_bytes=len(DATA) + 10)
    with pytest.raises(grpc.aio.AioRpcError, match=f"has {len(DATA)} bytes"):
        await stub(channel).Write(iter([header(longer, offset=len(DATA))]))
    assert await committed(channel) == (len(DATA), True)


@pytest.mark.parametrize(
    ("request_", "code"),
    [
        (pb.ReadRequest(digest=digest_of(b"nobody")), "NOT_FOUND"),
        (pb.ReadRequest(digest="sha256:../../lock"), "INVALID_ARGUMENT"),
        (pb.ReadRequest(digest=BLOB.digest, offset=-1), "INVALID_ARGUMENT"),
        (pb.ReadRequest(digest=BLOB.digest, offset=len(DATA) + 1), "OUT_OF_RANGE"),
    ],
)
async def test_wrong_reads(channel: grpc.aio.Channel, store: BlobStore, request_: pb.ReadRequest, code: str) -> None:
    await store.write(DATA)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub(channel).Read(request_).read()
    assert caught.value.code() is grpc.StatusCode[code]


async def test_a_corrupted_blob_is_told_and_written_again(
    channel: grpc.aio.Channel, store: BlobStore, tmp_path: Path
) -> None:
    await store.write(DATA)
    (file,) = [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
    file.write_bytes(b"!" + DATA[1:])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await read(channel)
    assert caught.value.code() is grpc.StatusCode.DATA_LOSS
    assert details(caught.value)[0].reason == "CORRUPTED"
    assert await committed(channel) == (0, False)
    await stub(channel).Write(iter([header(), *chunks(DATA)]))
    assert await read(channel) == DATA
