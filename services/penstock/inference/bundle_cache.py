"""Files of bundles on this machine, under their content's digest; nothing leaves it that does not have that digest."""

import asyncio
import hashlib
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from penstock.api.types.v1.blob_pb2 import Blob
from penstock.client.artifacts import read_blob
from penstock.client.errors import PenstockError as CallError
from penstock.rpc.errors import CorruptedError, NotReadyError
from penstock.rpc.validation import validating

if TYPE_CHECKING:
    from penstock.api.registry.v1.artifact_service_pb2_grpc import ArtifactServiceAsyncStub

_CORRUPTED = "CORRUPTED"
_PARTIAL = ".partial"

_log = structlog.get_logger("penstock.inference.cache")


class BundleCache:
    """Fetches blobs from the registry once and keeps them in a folder of its own."""

    def __init__(self, folder: Path, registry: "ArtifactServiceAsyncStub") -> None:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._folder = folder
        self._registry = registry
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def fetch(self, name: str, blob: Blob) -> Path:
        """The file with a blob's bytes, which have just been checked. `name` is for errors only.

        Raises:
            InvalidFieldError: the digest has not the form of one.
            CorruptedError: the registry's bytes do not have the digest, also when asked again.
            NotReadyError: the registry cannot be reached or does not have the blob, or the disk is full.
        """
        with validating() as violations:
            violations.digest(f"version.files[{name}].digest", blob.digest)
        path = self._folder / blob.digest.removeprefix("sha256:")
        async with self._locks[blob.digest]:
            if path.exists():
                if await asyncio.to_thread(_digest, path) == blob.digest:
                    return path
                _log.warning("corrupted file in the cache, fetching it again", file=name, digest=blob.digest)
                path.unlink()
            await self._download(name, blob, path)
        return path

    def prune(self, keep: set[str]) -> None:
        """Removes every file whose digest is not to be kept."""
        for path in self._folder.iterdir():
            if f"sha256:{path.name.removesuffix(_PARTIAL)}" not in keep:
                path.unlink()
                _log.info("file dropped from the cache", file=path.name)
        for digest in [digest for digest, lock in self._locks.items() if digest not in keep and not lock.locked()]:
            del self._locks[digest]

    async def _download(self, name: str, blob: Blob, path: Path) -> None:
        try:
            try:
                await read_blob(self._registry, blob, path)
            except CallError as error:
                if error.reason != _CORRUPTED:
                    raise
                _log.warning("corrupted bytes from the registry, fetching them again", file=name, digest=blob.digest)
                await read_blob(self._registry, blob, path)
        except CallError as error:
            if error.reason == _CORRUPTED:
                raise CorruptedError(
                    f"The registry's bytes of {name!r} do not have their digest {blob.digest}, fetched twice. Restore "
                    f"this blob in the registry's store from a backup, or deploy another version."
                ) from error
            raise NotReadyError(
                f"Cannot fetch {name!r} ({blob.digest}) from the registry: {error.code.name}: {error.message} "
                f"It is tried again."
            ) from error
        except OSError as error:
            raise NotReadyError(
                f"Cannot keep {name!r} ({blob.digest}, {blob.size_bytes} bytes) in the cache: {error.strerror}. Free "
                f"space on the disk of the inference service's home; it is tried again."
            ) from error


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
