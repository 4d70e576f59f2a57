"""From a version of the registry to a model that can be served: fetch its files, check them, open it."""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path

from penstock.api.registry.v1.model_pb2 import Version
from penstock.inference.bundle_cache import BundleCache
from penstock.inference.config_text import parse_config
from penstock.inference.inference import Loaded
from penstock.inference.model_config import ONNX, backend_of, model_file
from penstock.inference.onnx_file import external_locations
from penstock.inference.opening import ModelFiles, Opener
from penstock.inference.signature import Signature
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import InvalidFieldError, NotReadyError, WrongStateError
from penstock.rpc.validation import validating

CONFIG = "config.pbtxt"


class RegistrySource:
    """One version of the registry."""

    def __init__(self, loader: "RegistryLoader", version: Version) -> None:
        self._loader = loader
        self._version = version

    @property
    def keeps(self) -> Collection[str]:
        """The digests of all its files."""
        return [blob.digest for blob in self._version.files.values()]

    async def load(self) -> Loaded:
        return await self._loader.load(self._version)


class RegistryLoader:
    """Loads bundles. Opens one at a time: opening takes more memory than serving."""

    def __init__(self, cache: BundleCache, workspace: Path, opener: Opener) -> None:
        """`workspace` is a folder of the loader's own; what a crash left in it is removed."""
        shutil.rmtree(workspace, ignore_errors=True)
        workspace.mkdir(mode=0o700, parents=True)
        self._cache = cache
        self._workspace = workspace
        self._opener = opener
        self._opening = asyncio.Semaphore(1)

    def source(self, version: Version) -> RegistrySource:
        return RegistrySource(self, version)

    def prune(self, keep: set[str]) -> None:
        """Forgets every file whose digest is not to be kept."""
        self._cache.prune(keep)

    async def load(self, version: Version) -> Loaded:
        """Raises `PenstockError` where the version cannot be served; the text says why and what to do."""
        signature = Signature.of(version.signature)
        config = await self._config(version)
        files = await self._fetch(version, model_file(config))
        async with self._opening:
            with tempfile.TemporaryDirectory(dir=self._workspace) as folder:
                _link(files, Path(folder))
                labels = _labels(version, signature)
                return await self._opener.open(
                    ModelFiles(version.model, version.number, Path(folder), config, signature, labels)
                )

    async def _config(self, version: Version) -> ModelConfig:
        """The configuration that came with the bundle. Code and pipelines are not taken from the registry."""
        if CONFIG not in version.files:
            return ModelConfig()
        path = await self._cache.fetch(CONFIG, version.files[CONFIG])
        title = f"{CONFIG} of model {version.model!r} version {version.number}"
        try:
            config = parse_config(path.read_text(encoding="utf-8"), title)
        except UnicodeDecodeError as error:
            raise WrongStateError(f"{title} is not UTF-8: {error.reason}.") from error
        if backend_of(config) != ONNX:
            raise WrongStateError(f"{title} asks for backend {backend_of(config)!r}; the registry's models are ONNX.")
        return config

    async def _fetch(self, version: Version, model_name: str) -> Mapping[str, Path]:
        """The files that serving needs: the model and its external data, not what it was converted from."""
        with validating() as violations:
            for name in version.files:
                violations.file_name("version.files", name)
        if model_name not in version.files:
            raise InvalidFieldError.of(
                "version.files", f"expected {model_name[:80]!r} among them; got {sorted(version.files)}"
            )
        model = await self._cache.fetch(model_name, version.files[model_name])
        locations = await asyncio.to_thread(external_locations, model)
        if unlisted := sorted(locations - set(version.files)):
            raise WrongStateError(
                f"{model_name} has external data in {unlisted[0][:80]!r}, which is not a file of the bundle "
                f"({', '.join(sorted(version.files))}). Register the version again with all its files."
            )
        data = {name: await self._cache.fetch(name, version.files[name]) for name in sorted(locations)}
        return {**data, model_name: model}


def _link(files: Mapping[str, Path], folder: Path) -> None:
    """ONNX Runtime finds external data by name beside the model, so the files get their names back for a moment."""
    for name, path in files.items():
        try:
            os.link(path, folder / name)
        except OSError as error:
            raise NotReadyError(
                f"Cannot link {name!r} from the cache to the workspace beside it: {error.strerror}."
            ) from error


def _labels(version: Version, signature: Signature) -> dict[str, list[str]]:
    """The version's labels, for the outputs whose last axis has as many elements."""
    labels = list(version.labels)
    return {
        name: labels for name, tensor in signature.outputs.items() if labels and tensor.shape[-1:] == (len(labels),)
    }
