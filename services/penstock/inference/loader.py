"""From a version that is to be served to an engine that can: fetch, check, open, warm up."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from penstock.api.registry.v1.model_pb2 import Version
from penstock.inference.bundle_cache import BundleCache
from penstock.inference.engine import Engine
from penstock.inference.external_data import external_locations
from penstock.inference.onnx_engine import OnnxEngine
from penstock.inference.signature import BATCH, Signature, Tensor
from penstock.inference.tensors import BYTES, Array
from penstock.rpc.errors import InvalidFieldError, NotReadyError, PenstockError, WrongStateError
from penstock.rpc.validation import validating

MODEL = "model.onnx"

# Sizes to try for dynamic axes other than the rows: a convolution may need more than one step.
_WARM_UP_SIZES = (1, 16, 256)


@dataclass(frozen=True)
class Loaded:
    """A version that can be served."""

    signature: Signature
    engine: Engine


class Loader(Protocol):
    """Brings versions into memory, and keeps what it needs for that."""

    async def load(self, version: Version) -> Loaded:
        """Raises `PenstockError` where the version cannot be served; the text says why and what to do."""

    def prune(self, keep: set[str]) -> None:
        """Forgets every file whose digest is not to be kept."""


class OnnxLoader:
    """The loader of bundles with a `model.onnx`. Opens one at a time: opening takes more memory than serving."""

    def __init__(self, cache: BundleCache, workspace: Path, threads: int, warm_up: bool) -> None:
        """`workspace` is a folder of the loader's own; what a crash left in it is removed."""
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir(mode=0o700, parents=True)
        self._cache = cache
        self._workspace = workspace
        self._threads = threads
        self._warm_up = warm_up
        self._opening = asyncio.Semaphore(1)

    async def load(self, version: Version) -> Loaded:
        signature = Signature.of(version.signature)
        files = await self._fetch(version)
        async with self._opening:
            engine = await asyncio.to_thread(self._open, files, signature)
        return Loaded(signature, engine)

    def prune(self, keep: set[str]) -> None:
        self._cache.prune(keep)

    async def _fetch(self, version: Version) -> Mapping[str, Path]:
        """The files that serving needs: the model and its external data, not what it was converted from."""
        with validating() as violations:
            for name in version.files:
                violations.file_name("version.files", name)
        if MODEL not in version.files:
            raise InvalidFieldError.of("version.files", f"expected {MODEL!r} among them; got {sorted(version.files)}")
        model = await self._cache.fetch(MODEL, version.files[MODEL])
        locations = await asyncio.to_thread(external_locations, model)
        if unlisted := sorted(locations - set(version.files)):
            raise WrongStateError(
                f"model.onnx has external data in {unlisted[0][:80]!r}, which is not a file of the bundle "
                f"({', '.join(sorted(version.files))}). Register the version again with all its files."
            )
        data = {name: await self._cache.fetch(name, version.files[name]) for name in sorted(locations)}
        return {**data, MODEL: model}

    def _open(self, files: Mapping[str, Path], signature: Signature) -> Engine:
        """ONNX Runtime finds external data by name beside the model, so the files get their names back for a moment."""
        with tempfile.TemporaryDirectory(dir=self._workspace) as folder:
            for name, path in files.items():
                try:
                    os.link(path, Path(folder) / name)
                except OSError as error:
                    raise NotReadyError(
                        f"Cannot link {name!r} from the cache to the workspace beside it: {error.strerror}."
                    ) from error
            engine = OnnxEngine(Path(folder) / MODEL, signature, self._threads)
        if self._warm_up:
            try:
                warm_up(engine, signature)
            except PenstockError:
                engine.close()
                raise
        return engine


def warm_up(engine: Engine, signature: Signature) -> None:
    """Runs an engine on generated rows, one and then two of them, and checks that the answers have as many.

    Raises `WrongStateError` if no size of the dynamic axes makes it run, or answers do not follow the batch.
    """
    failure: PenstockError | None = None
    for size in _sizes(signature):
        try:
            for rows in (1, 2) if signature.batched else (1,):
                answers = engine.run(_generated(signature, rows, size), list(signature.outputs))
                _check_rows(signature, answers, rows)
        except WrongStateError:
            raise
        except PenstockError as error:
            failure = error
        else:
            return
    raise WrongStateError(
        f"Warm-up failed: {failure} If the model cannot take generated values (ones), set warm_up to false."
    ) from failure


def _sizes(signature: Signature) -> tuple[int, ...]:
    dynamic = {axis for tensor in signature.inputs.values() for axis in tensor.shape if isinstance(axis, str)}
    return _WARM_UP_SIZES if dynamic - {BATCH} else _WARM_UP_SIZES[:1]


def _generated(signature: Signature, rows: int, size: int) -> dict[str, Array]:
    """Ones, not zeros: a graph that divides integers by an input ends the process on a zero."""
    return {name: _ones(tensor, rows, size) for name, tensor in signature.inputs.items()}


def _ones(tensor: Tensor, rows: int, size: int) -> Array:
    shape = [axis if isinstance(axis, int) else rows if axis == BATCH else size for axis in tensor.shape]
    return np.full(shape, "1" if tensor.datatype is BYTES else 1, tensor.datatype.dtype)


def _check_rows(signature: Signature, answers: list[Array], rows: int) -> None:
    if signature.batched:
        for name, answer in zip(signature.outputs, answers, strict=True):
            if answer.shape[:1] != (rows,):
                raise WrongStateError(
                    f"Output {name!r} does not follow the batch: expected {rows} rows; got shape {list(answer.shape)}."
                )


def file_digests(version: Version) -> Iterator[str]:
    """The digests of all files of a version."""
    return (blob.digest for blob in version.files.values())
