"""The ArtifactService over a blob store. The registry and the training service both serve it."""

from collections.abc import AsyncIterator

from penstock.api.registry.v1 import artifact_service_pb2 as pb
from penstock.api.registry.v1 import artifact_service_pb2_grpc as rpc
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.rpc.errors import InvalidFieldError
from penstock.rpc.server import Service
from penstock.rpc.validation import Violations, validating
from penstock.storage.blobs import CHUNK_BYTES, BlobRef, BlobStore, Upload

MAX_BLOB_BYTES = 16 * 1024**3


def checked_blob(violations: Violations, field: str, blob: Blob, max_bytes: int = MAX_BLOB_BYTES) -> BlobRef:
    """A message's blob as the store names it, its form checked."""
    violations.digest(f"{field}.digest", blob.digest)
    violations.within(f"{field}.size_bytes", blob.size_bytes, 0, max_bytes)
    return BlobRef(blob.digest, blob.size_bytes)


async def receive(upload: Upload, chunks: AsyncIterator[bytes], ref: BlobRef) -> None:
    """Takes an upload's remaining chunks and makes the blob visible.

    Raises `InvalidFieldError` for a chunk of a forbidden size, or if the stream ends before the last byte.
    """
    async for chunk in chunks:
        if not 0 < len(chunk) <= CHUNK_BYTES:
            raise InvalidFieldError.of("chunk", f"expected 1 to {CHUNK_BYTES} bytes; got {len(chunk)}")
        await upload.append(chunk)
    if not await upload.finish():
        raise InvalidFieldError.of(
            "chunk", f"the stream ended before byte {ref.size_bytes}; resume at the committed size"
        )


class ArtifactServicer(rpc.ArtifactServiceServicer):
    """Translates between the wire and the blob store."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs

    def service(self) -> Service:
        return Service(pb.DESCRIPTOR, lambda server: rpc.add_ArtifactServiceServicer_to_server(self, server))

    async def Write(self, request_iterator: AsyncIterator[pb.WriteRequest], context: object) -> pb.WriteResponse:
        header = await first_header(request_iterator)
        with validating() as violations:
            ref = checked_blob(violations, "header.blob", header.blob)
            violations.require(header.offset >= 0, "header.offset", f"expected 0 or more; got {header.offset}")
        if await self._blobs.size(ref.digest) == ref.size_bytes:
            return pb.WriteResponse(blob=header.blob)
        async with self._blobs.upload(ref, header.offset) as upload:
            await receive(upload, (request.chunk async for request in request_iterator), ref)
        return pb.WriteResponse(blob=header.blob)

    async def QueryWriteStatus(
        self, request: pb.QueryWriteStatusRequest, context: object
    ) -> pb.QueryWriteStatusResponse:
        with validating() as violations:
            violations.digest("digest", request.digest)
        complete = await self._blobs.size(request.digest) is not None
        committed = await self._blobs.committed(request.digest)
        return pb.QueryWriteStatusResponse(committed_size_bytes=committed, complete=complete)

    async def Read(self, request: pb.ReadRequest, context: object) -> AsyncIterator[pb.ReadResponse]:
        with validating() as violations:
            violations.digest("digest", request.digest)
            violations.require(request.offset >= 0, "offset", f"expected 0 or more; got {request.offset}")
        async for chunk in self._blobs.read(request.digest, request.offset):
            yield pb.ReadResponse(data=chunk)


async def first_header(requests: AsyncIterator[pb.WriteRequest]) -> pb.WriteHeader:
    """The header that an upload must begin with."""
    async for request in requests:
        if request.WhichOneof("part") == "header":
            return request.header
        break
    raise InvalidFieldError.of("header", "the first message must be a header")
