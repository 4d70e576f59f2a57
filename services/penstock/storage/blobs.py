"""A content-addressed store of blobs, with uploads that can be resumed.

Uploads are staged in a local folder and become visible, in one step, once size and sha256 agree. What is visible lies
in an object store: a local folder, or whatever obstore has a URL for (`s3://`, `gs://`, `az://`).
"""

import asyncio
import errno
import hashlib
import os
import re
import threading
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import obstore
import structlog
from obstore.exceptions import BaseError
from obstore.store import LocalStore, ObjectStore, from_url

from penstock.rpc.errors import (
    ConflictError,
    CorruptedError,
    InvalidFieldError,
    NotFoundError,
    StartupError,
    StorageFullError,
    WrongOffsetError,
)
from penstock.rpc.validation import DIGEST

CHUNK_BYTES = 1024 * 1024
ABANDONED_AFTER_S = 7 * 24 * 3600

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_OS_ERROR = re.compile(r"os error (\d+)")

_log = structlog.get_logger("penstock.blobs")


@dataclass(frozen=True)
class BlobRef:
    """A blob's name: `sha256:` and 64 hexadecimal digits, and its size in bytes."""

    digest: str
    size_bytes: int


def digest_of(data: bytes) -> str:
    """The digest that names these bytes."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


class BlobStore:
    """Blobs by digest. Digests must have been checked for their form; they become file names here."""

    def __init__(self, folder: Path, url: str | None = None) -> None:
        """Opens the store in `folder`, or at `url` with `folder` for staging only."""
        self._staging = folder / "uploads"
        self._staging.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._root = folder / "blobs" if url is None else None
        self._store: ObjectStore = LocalStore(self._root, mkdir=True) if self._root else from_url(url or "")
        self._writing: set[str] = set()
        # Found by reading; they count as absent until somebody writes them again.
        self._corrupted: set[str] = set()
        self._discard_abandoned()

    async def size(self, digest: str) -> int | None:
        """The size of a visible blob in bytes; None if there is none, or if a read has found it corrupted."""
        return None if digest in self._corrupted else await self._stored_size(digest)

    async def committed(self, digest: str) -> int:
        """How many bytes of a blob are kept, visible or not."""
        size = await self.size(digest)
        return self._staged_size(digest) if size is None else size

    @asynccontextmanager
    async def upload(self, ref: BlobRef, offset: int) -> AsyncIterator["Upload"]:
        """One stream's turn at writing a blob.

        Raises:
            ConflictError: another stream writes this blob.
            InvalidFieldError: the blob is visible and has another size.
            StorageFullError: the disk is full.
            WrongOffsetError: `offset` is not the committed size.
        """
        if ref.digest in self._writing:
            raise ConflictError(f"Another stream is writing {ref.digest}. Wait until it has ended, then resume.")
        self._writing.add(ref.digest)
        upload: Upload | None = None
        try:
            upload = await self._opened(ref, offset)
            yield upload
        finally:
            # A stream that breaks is cancelled just here: what waits for a thread would never run.
            await asyncio.shield(self._ended(ref.digest, upload))

    async def write(self, data: bytes) -> BlobRef:
        """Stores bytes that are at hand. Raises `StorageFullError` if the disk is full."""
        ref = BlobRef(digest_of(data), len(data))
        if await self.size(ref.digest) != ref.size_bytes:
            # Not `<digest>.part`: a stream may be writing that, with bytes that nobody has checked.
            staged = self._staging / f"{uuid.uuid4().hex}.part"
            try:
                await asyncio.to_thread(_write_durably, staged, data)
                await self._move(staged, ref.digest)
            except (BaseError, OSError) as error:
                raise _storage_error(error, ref.digest) from error
            finally:
                staged.unlink(missing_ok=True)
        return ref

    async def read(self, digest: str, offset: int = 0) -> AsyncIterator[bytes]:
        """The bytes from `offset` on, in chunks of at most `CHUNK_BYTES`.

        Raises:
            NotFoundError: there is no such blob.
            WrongOffsetError: `offset` is above the size.
            CorruptedError: after the last chunk of a read from 0, if the bytes no longer have the digest.
        """
        size = await self._stored_size(digest)
        if size is None:
            raise NotFoundError("blob", digest)
        if offset > size:
            raise WrongOffsetError(f"Blob {digest} has {size} bytes, and the read begins at {offset}.")
        sha256 = hashlib.sha256()
        if offset < size:
            try:
                result = await obstore.get_async(self._store, _key(digest), options={"range": {"offset": offset}})
            except FileNotFoundError as error:
                raise NotFoundError("blob", digest) from error
            async for piece in result.stream(min_chunk_size=CHUNK_BYTES):
                view = memoryview(piece)
                for start in range(0, len(view), CHUNK_BYTES):
                    chunk = bytes(view[start : start + CHUNK_BYTES])
                    sha256.update(chunk)
                    yield chunk
        if offset > 0:
            return
        if digest != f"sha256:{sha256.hexdigest()}":
            _log.error("corrupted blob", digest=digest)
            self._corrupted.add(digest)
            raise CorruptedError(
                f"The stored bytes of {digest} no longer have this digest. Restore them from a backup or write them "
                f"again."
            )
        self._corrupted.discard(digest)

    async def delete(self, digest: str) -> None:
        """Removes a blob; that it is not there is no error."""
        try:
            await obstore.delete_async(self._store, _key(digest))
        except FileNotFoundError:
            return

    async def publish(self, ref: BlobRef) -> None:
        """Makes a completely staged blob visible, after checking its digest. Called by `Upload.finish`."""
        staged = self.staged_path(ref.digest)
        found = await asyncio.to_thread(_file_digest, staged)
        if found != ref.digest:
            staged.unlink()
            raise InvalidFieldError.of(
                "header", f"the {ref.size_bytes} bytes that came have {found}, not {ref.digest}; they are discarded"
            )
        try:
            await self._move(staged, ref.digest)
        except (BaseError, OSError) as error:
            raise _storage_error(error, ref.digest) from error

    async def _opened(self, ref: BlobRef, offset: int) -> "Upload":
        visible = await self._visible(ref)
        committed = ref.size_bytes if visible else self._staged_size(ref.digest)
        if committed > ref.size_bytes:
            # Somebody staged more bytes than this blob has; they cannot become it.
            self.staged_path(ref.digest).unlink(missing_ok=True)
            committed = 0
        if offset != committed:
            raise WrongOffsetError(
                f"The upload of {ref.digest} stands at byte {committed}, and the stream begins "
                f"at {offset}. Resume at {committed}.",
                committed_size_bytes=str(committed),
            )
        return Upload(self, ref, visible)

    async def _ended(self, digest: str, upload: "Upload | None") -> None:
        """Lets the next stream write only after this one's last write is over."""
        try:
            if upload is not None:
                await asyncio.to_thread(upload.close)
        finally:
            self._writing.discard(digest)

    async def _move(self, staged: Path, digest: str) -> None:
        """Staged bytes become visible whole or not at all; in a folder by a rename, which needs no second copy."""
        if self._root is not None:
            await asyncio.to_thread(_rename_durably, staged, self._root / _key(digest))
        else:
            await obstore.put_async(self._store, _key(digest), staged)
            await asyncio.to_thread(staged.unlink)
        self._corrupted.discard(digest)

    async def _visible(self, ref: BlobRef) -> bool:
        """Whether a blob is there; where its size is not the announced one, its bytes decide who is wrong."""
        size = await self.size(ref.digest)
        if size is None or size == ref.size_bytes:
            return size is not None
        try:
            async for _ in self.read(ref.digest):
                pass
        except CorruptedError:
            return False
        raise InvalidFieldError.of("header", f"{ref.digest} has {size} bytes, not {ref.size_bytes}")

    async def _stored_size(self, digest: str) -> int | None:
        try:
            return (await obstore.head_async(self._store, _key(digest)))["size"]
        except FileNotFoundError:
            return None

    def staged_path(self, digest: str) -> Path:
        return self._staging / f"{_hexadecimal(digest)}.part"

    def _staged_size(self, digest: str) -> int:
        try:
            return self.staged_path(digest).stat().st_size
        except FileNotFoundError:
            return 0

    def _discard_abandoned(self) -> None:
        for staged in self._staging.glob("*.part"):
            if time.time() - staged.stat().st_mtime > ABANDONED_AFTER_S:
                staged.unlink()
                _log.info("abandoned upload discarded", upload=staged.name)


def open_blobs(folder: Path, url: str | None) -> BlobStore:
    """A server's store. Raises `StartupError` if there can be none at `url`."""
    try:
        return BlobStore(folder, url)
    except (BaseError, ValueError) as error:
        raise StartupError(f"Cannot open the blob store at blob_url {url!r}: {error}. Correct the URL.") from error


class Upload:
    """Bytes of one blob on their way in."""

    def __init__(self, store: BlobStore, ref: BlobRef, complete: bool) -> None:
        self._store = store
        self._ref = ref
        self._complete = complete
        # A cancelled stream leaves its last write running in a thread: the file must not be closed under it.
        self._lock = threading.Lock()
        self._file = -1 if complete else _open_staged(store.staged_path(ref.digest), ref.digest)
        self._size = ref.size_bytes if complete else os.fstat(self._file).st_size

    async def append(self, chunk: bytes) -> None:
        """Adds the next bytes.

        Raises:
            InvalidFieldError: more bytes come than the header announced.
            StorageFullError: the disk is full; what was written before stays.
        """
        if self._size + len(chunk) > self._ref.size_bytes:
            came = f"{self._size + len(chunk)} came"
            raise InvalidFieldError.of("chunk", f"the header announced {self._ref.size_bytes} bytes; {came}")
        await asyncio.to_thread(self._write, chunk)

    async def finish(self) -> bool:
        """Makes the blob visible if all bytes are there, and says whether they are.

        Raises:
            InvalidFieldError: the bytes have another digest; they are discarded.
            StorageFullError: the disk is full; what was written stays.
        """
        if self._size < self._ref.size_bytes:
            return False
        if not self._complete:
            await asyncio.to_thread(self.close)
            await self._store.publish(self._ref)
            self._complete = True
        return True

    def close(self) -> None:
        """Brings what was written to the disk and closes the file. Raises `StorageFullError` if the disk is full."""
        with self._lock:
            if self._file < 0:
                return
            try:
                os.fsync(self._file)
            except OSError as error:
                raise _storage_error(error, self._ref.digest) from error
            finally:
                os.close(self._file)
                self._file = -1

    def _write(self, chunk: bytes) -> None:
        view = memoryview(chunk)
        with self._lock:
            try:
                while view and self._file >= 0:
                    written = os.write(self._file, view)
                    self._size += written
                    view = view[written:]
            except OSError as error:
                raise _storage_error(error, self._ref.digest) from error


def _hexadecimal(digest: str) -> str:
    """A digest's part that becomes a file name. Callers check digests; that none becomes a path is checked here too."""
    if not DIGEST.fullmatch(digest):
        raise ValueError(f"expected a digest, got {digest!r}")
    return digest.removeprefix("sha256:")


def _key(digest: str) -> str:
    hexadecimal = _hexadecimal(digest)
    return f"sha256/{hexadecimal[:2]}/{hexadecimal}"


def _open_staged(path: Path, digest: str) -> int:
    try:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise _storage_error(error, digest) from error


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _write_durably(path: Path, data: bytes) -> None:
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _rename_durably(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    source.replace(target)
    for folder in (target.parent, target.parent.parent, target.parent.parent.parent):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _storage_error(error: Exception, digest: str) -> Exception:
    """Tells a full disk, which the caller can wait out, from every other fault."""
    number = error.errno if isinstance(error, OSError) else None
    if number is None and (match := _OS_ERROR.search(str(error))):
        number = int(match[1])
    if number in _FULL:
        return StorageFullError(
            f"The disk is full ({os.strerror(number)}) while storing {digest}. What was committed is kept: "
            f"free space, then resume."
        )
    return error
