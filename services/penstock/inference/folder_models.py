"""Serves a folder of models: all of them from the start, as they change, or as clients ask for them."""

import asyncio
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import structlog

from penstock.inference.config_text import parse_config_json
from penstock.inference.control import IndexEntry
from penstock.inference.external_data import external_locations
from penstock.inference.folder import FolderModel, FolderVersion, is_name, model_names, needs, read_labels, read_model
from penstock.inference.index import NOT_ALLOWED, index_of
from penstock.inference.inference import Loaded
from penstock.inference.model_config import ONNX, backend_of, model_file
from penstock.inference.opening import ModelFiles, Opener
from penstock.inference.repository import Repository, UnknownModelError
from penstock.inference.served_version import State
from penstock.inference.uploads import Uploads
from penstock.inference.wanted import Desired, WantedVersion
from penstock.rpc.errors import InvalidFieldError, NotReadyError, StartupError, WrongStateError

# How long an unload waits for the requests in flight.
_UNLOAD_LIMIT_S = 60.0

_log = structlog.get_logger("penstock.inference.folder")


class FolderSource:
    """One version of a folder. Opens one at a time: opening takes more memory than serving."""

    keeps: Collection[str] = ()

    def __init__(
        self, version: FolderVersion, opener: Opener, opening: asyncio.Semaphore, repository: Repository
    ) -> None:
        self._version = version
        self._opener = opener
        self._opening = opening
        self._repository = repository

    async def load(self) -> Loaded:
        version = self._version
        labels = await asyncio.to_thread(read_labels, version)
        if backend_of(version.config) == ONNX:
            await asyncio.to_thread(_check_external_data, version)
        for model in needs(version.config):
            # What an ensemble is made of first. Ensembles in it are not waited for: they could be waiting for this one.
            if not self._repository.needs(model):
                await self._repository.model_settled(model)
        async with self._opening:
            return await self._opener.open(
                ModelFiles(version.model, version.number, version.folder, version.config, None, labels, trusted=True)
            )


class FolderModels:
    """The `ModelControl` over a folder, and what keeps the repository in step with it."""

    def __init__(self, root: Path, repository: Repository, opener: Opener, uploads: Uploads, *, explicit: bool) -> None:
        self._root = root
        self._repository = repository
        self._opener = opener
        self._uploads = uploads
        self._explicit = explicit
        self._opening = asyncio.Semaphore(1)
        # One load or unload of a model at a time.
        self._locks: dict[str, asyncio.Lock] = {}
        self._revision = 0
        self._problems: dict[str, str] = {}

    async def start(self, names: Sequence[str]) -> None:
        """Serves all models of the folder; in explicit mode those of these names, `*` standing for all.

        Raises `StartupError` if the folder cannot be read.
        """
        try:
            known = await asyncio.to_thread(model_names, self._root)
        except OSError as error:
            raise StartupError(f"Cannot read the model repository {self._root}: {error.strerror}.") from error
        wanted = known if not self._explicit or "*" in names else list(names)
        self._apply([await asyncio.to_thread(read_model, self._root, name) for name in wanted])

    async def poll(self, interval_s: float) -> None:
        """Looks for changes until it is cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                names = await asyncio.to_thread(model_names, self._root)
                self._apply([await asyncio.to_thread(read_model, self._root, name) for name in names])
            except OSError as error:
                _log.error("cannot read the model repository, serving what was there", error=error.strerror)

    async def load(self, model: str, config_json: str | None, files: Mapping[str, bytes]) -> None:
        """Loads or reloads a model; returns when all its versions are READY. Raises as `ModelControl.load`."""
        self._check_explicit()
        if not is_name(model):
            raise InvalidFieldError.of("model_name", f"expected the name of a model's folder; got {model[:80]!r}")
        if files and config_json is None:
            raise InvalidFieldError.of("parameters", "expected 'config' beside uploaded files")
        await self._load(model, config_json, files, (model,))

    async def _load(
        self, model: str, config_json: str | None, files: Mapping[str, bytes], path: tuple[str, ...]
    ) -> None:
        """Loads a model, and before it what it is made of. `path` are the ensembles that asked for it."""
        read = await self._read(model, config_json, files)
        if read.problem:
            raise WrongStateError(f"failed to load {model!r}: {read.problem}")
        for part in sorted({part for one in read.versions for part in needs(one.config)}.difference(path)):
            if not self._repository.wanted(part):
                await self._load(part, None, {}, (*path, part))
        async with self._locks.setdefault(model, asyncio.Lock()):
            self._repository.apply_model(model, self._wanted(read))
            failed = [one for one in await self._repository.model_settled(model) if one.state is State.FAILED]
            if failed:
                reasons = "; ".join(f"version {one.number}: {one.message}" for one in failed)
                if not any(one.state is State.READY for one in self._repository.versions(model)):
                    self._repository.apply_model(model, ())
                self._problems[model] = reasons
                raise WrongStateError(f"failed to load {model!r}: {reasons}")
            self._problems.pop(model, None)

    async def unload(self, model: str, unload_dependents: bool) -> None:
        """Unloads a model; returns when its memory has been given back. Raises as `ModelControl.unload`."""
        self._check_explicit()
        versions = self._repository.versions(model) if model else []
        if not versions:
            raise UnknownModelError(model, "", "It is not loaded.")
        parts = self._parts(model) if unload_dependents else frozenset()
        async with self._locks.setdefault(model, asyncio.Lock()):
            self._repository.apply_model(model, ())
            try:
                async with asyncio.timeout(_UNLOAD_LIMIT_S):
                    await self._repository.model_gone(model)
            except TimeoutError:
                raise NotReadyError(
                    f"Model {model!r} still answers requests after {_UNLOAD_LIMIT_S:g} s; it goes when they have ended."
                ) from None
            self._uploads.discard(model)
            self._problems[model] = "unloaded"
        for part in parts:
            if self._repository.wanted(part):
                await self.unload(part, unload_dependents)

    async def index(self) -> Sequence[IndexEntry]:
        held = index_of(self._repository)
        names = await asyncio.to_thread(model_names, self._root)
        loaded = {entry.model for entry in held}
        rest = [name for name in {*names, *self._problems} if name not in loaded]
        others = [
            IndexEntry(name, "", "UNAVAILABLE" if self._problems.get(name) else "", self._problems.get(name, ""))
            for name in rest
        ]
        return sorted([*held, *others], key=lambda entry: (entry.model, entry.version))

    def _check_explicit(self) -> None:
        if not self._explicit:
            raise WrongStateError(NOT_ALLOWED)

    async def _read(self, model: str, config_json: str | None, files: Mapping[str, bytes]) -> FolderModel:
        override = None if config_json is None else parse_config_json(config_json, f"The config of model {model!r}")
        if not files:
            if not await asyncio.to_thread((self._root / model).is_dir):
                return FolderModel(model, (), f"there is no folder {model!r} in the model repository.")
            return await asyncio.to_thread(read_model, self._root, model, override)
        root = await self._uploads.keep(model, files)
        return await asyncio.to_thread(read_model, root, model, override)

    def _parts(self, model: str) -> frozenset[str]:
        ready = [one for one in self._repository.versions(model) if one.state is State.READY]
        return frozenset(name for one in ready for name in needs(one.config))

    def _apply(self, models: Sequence[FolderModel]) -> None:
        for model in models:
            if model.problem and self._problems.get(model.name) != model.problem:
                _log.error("model cannot be served", model=model.name, error=model.problem)
        self._problems = {model.name: model.problem for model in models if model.problem}
        self._revision += 1
        wanted = [version for model in models for version in self._wanted(model)]
        # A model that cannot be read now, half written perhaps, goes on as it was.
        kept = [
            held.wanted
            for name in self._problems
            for held in self._repository.versions(name)
            if held.state is State.READY
        ]
        self._repository.apply(Desired.of(self._revision, [*wanted, *kept]))

    def _wanted(self, model: FolderModel) -> list[WantedVersion]:
        return [
            WantedVersion(
                one.model,
                one.number,
                one.digest,
                0,
                FolderSource(one, self._opener, self._opening, self._repository),
                needs(one.config),
            )
            for one in model.versions
        ]


def _check_external_data(version: FolderVersion) -> None:
    """Raises `WrongStateError` for external data that does not lie beside the model."""
    model = version.folder / model_file(version.config)
    if not is_name(model_file(version.config)):
        raise WrongStateError(f"default_model_filename {model_file(version.config)[:80]!r} is no plain name.")
    if model.is_dir():
        model /= model.name
    if not model.is_file():
        raise WrongStateError(f"There is no file {model.name} in {version.model}/{version.number}.")
    for location in sorted(external_locations(model)):
        if not is_name(location) or not (model.parent / location).is_file():
            raise WrongStateError(f"{model.name} has external data in {location[:80]!r}, which is no file beside it.")
