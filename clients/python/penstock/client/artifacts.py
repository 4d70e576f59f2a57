"""Blobs to and from an ArtifactService, across broken connections."""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from penstock.api.registry.v1 import artifact_service_pb2 as pb
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.client.errors import PenstockError, answer

if TYPE_CHECKING:
    from penstock.api.registry.v1.artifact_service_pb2_grpc import ArtifactServiceAsyncStub

CHUNK_BYTES = 1024 * 1024
ATTEMPTS = 6
FIRST_PAUSE_S = 0.2

# Worth another try: the server restarts, another stream has not let go yet, or the offset was overtaken.
TRANSIENT = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.OUT_OF_RANGE}

# Told, again and again, how many more bytes have been transferred.
Progress = Callable[[int], None]


def unobserved(_: int) -> None:
    """Nobody wants to know how far a transfer has come."""


async def describe_file(path: Path) -> Blob:
    """The digest and size of a file."""

    def describe() -> Blob:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return Blob(digest=f"sha256:{digest}", size_bytes=file.tell())

    return await asyncio.to_thread(describe)


async def file_chunks(path: Path, offset: int, progress: Progress) -> AsyncIterator[bytes]:
    """The bytes of a file from `offset` on, in chunks that the services take."""
    with path.open("rb") as file:
        file.seek(offset)
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk
            progress(len(chunk))


async def write_blob(stub: "ArtifactServiceAsyncStub", path: Path, progress: Progress = unobserved) -> Blob:
    """Stores a file as a blob, from where an earlier try left off. Raises `PenstockError` if it cannot be stored."""
    blob = await describe_file(path)
    for attempt in range(ATTEMPTS):
        try:
            status = await answer(stub.QueryWriteStatus(pb.QueryWriteStatusRequest(digest=blob.digest)))
            if not status.complete:
                await answer(stub.Write(_write_requests(blob, path, status.committed_size_bytes, progress)))
        except PenstockError as error:
            await pause_or_raise(error, attempt)
        else:
            break
    return blob


async def read_blob(
    stub: "ArtifactServiceAsyncStub", blob: Blob, target: Path, progress: Progress = unobserved
) -> None:
    """Fetches a blob into a file, which appears only when size and digest agree.

    Raises `PenstockError` if it cannot be fetched; the reason is CORRUPTED if other bytes came than the digest names.
    """
    partial = target.with_name(target.name + ".partial")
    partial.unlink(missing_ok=True)
    for attempt in range(ATTEMPTS):
        try:
            await _read_rest(stub, blob, partial, progress)
        except PenstockError as error:
            await pause_or_raise(error, attempt)
        else:
            break
    found = await describe_file(partial)
    if found != blob:
        partial.unlink()
        raise PenstockError(
            f"Expected {blob.digest} with {blob.size_bytes} bytes; {found.digest} with {found.size_bytes} "
            f"came. Restore the blob on the server, or write it again.",
            grpc.StatusCode.DATA_LOSS,
            "CORRUPTED",
        )
    partial.replace(target)


async def pause_or_raise(error: PenstockError, attempt: int) -> None:
    """Waits before the next of `ATTEMPTS` tries; raises the error if there is none left or trying again is no use."""
    if error.code not in TRANSIENT or attempt == ATTEMPTS - 1:
        raise error
    await asyncio.sleep(FIRST_PAUSE_S * 2**attempt)


async def _write_requests(blob: Blob, path: Path, offset: int, progress: Progress) -> AsyncIterator[pb.WriteRequest]:
    yield pb.WriteRequest(header=pb.WriteHeader(blob=blob, offset=offset))
    async for chunk in file_chunks(path, offset, progress):
        yield pb.WriteRequest(chunk=chunk)


async def _read_rest(stub: "ArtifactServiceAsyncStub", blob: Blob, partial: Path, progress: Progress) -> None:
    with partial.open("ab") as file:
        request = pb.ReadRequest(digest=blob.digest, offset=file.tell())
        try:
            async for response in stub.Read(request):
                if file.tell() + len(response.data) > blob.size_bytes:
                    break
                await asyncio.to_thread(file.write, response.data)
                progress(len(response.data))
        except grpc.aio.AioRpcError as error:
            raise PenstockError.from_rpc(error) from error
