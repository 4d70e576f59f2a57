"""Serves a folder of models: all of them from the start, as they change, or as clients ask for them."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Collection, Coroutine, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import structlog

from penstock.inference.config_text import parse_config_json, warn_of_unknown
from penstock.inference.control import IndexEntry
from penstock.inference.folder import (
    CONFIG,
    FolderModel,
    FolderVersion,
    is_name,
    model_names,
    needs,
    read_labels,
    read_model,
)
from penstock.inference.index import NOT_ALLOWED, index_of
from penstock.inference.inference import Loaded
from penstock.inference.model_config import PYTHON, backend_of
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
        if path := _cycle(self._repository, version.model):
            raise WrongStateError(f"Model {version.model!r} is part of itself: {' → '.join(path)}.")
        labels = await asyncio.to_thread(read_labels, version)
        for model in needs(version.config):
            # What an ensemble is made of first. Ensembles in it are not waited for: what they are made of may change
            # while they load, and then they would wait for this one. It is tried again when they are READY.
            if not self._repository.needs(model):
                await self._repository.model_settled(model)
        async with self._opening:
            files = ModelFiles(
                version.model, version.number, version.folder, version.config, None, labels, trusted=version.trusted
            )
            return await self._opener.open(files)


class FolderModels:
    """The `ModelControl` over a folder, and what keeps the repository in step with it."""

    def __init__(self, root: Path, repository: Repository, opener: Opener, uploads: Uploads, *, explicit: bool) -> None:
        self._root = root
        self._repository = repository
        self._opener = opener
        self._uploads = uploads
        self._explicit = explicit
        self._opening = asyncio.Semaphore(1)
        # One load or unload of a model at a time: its lock, and how many hold it or wait for it.
        self._locks: dict[str, tuple[asyncio.Lock, int]] = {}
        # Unloads that wait for their turn or have it, by model: the loads before them give way.
        self._unloads = Counter[str]()
        self._begun: set[asyncio.Task[None]] = set()
        self._desired = Desired(0)
        # Why models are not served, by name; in explicit mode only of those that have a folder.
        self._problems: dict[str, str] = {}
        # Fields of configurations that are ignored, by model, as the log has them.
        self._unknown: dict[str, Sequence[str]] = {}

    async def start(self, names: Sequence[str]) -> None:
        """Serves all models of the folder; in explicit mode those of these names, `*` standing for all.

        Raises `StartupError` if the folder cannot be read.
        """
        try:
            known = await asyncio.to_thread(model_names, self._root)
        except OSError as error:
            raise StartupError(f"Cannot read the model repository {self._root}: {error.strerror}.") from error
        wanted = known if not self._explicit or "*" in names else list(dict.fromkeys(names))
        if unnamed := [name for name in wanted if not is_name(name)]:
            raise StartupError(f"Cannot load {unnamed[0][:80]!r}: expected the name of a model's folder.")
        models: list[FolderModel] = []
        for name in wanted:
            models.append(await asyncio.to_thread(read_model, self._root, name))
            # The list grows while it is walked: what an ensemble is made of is loaded with it.
            wanted.extend(sorted(part for part in _parts(models[-1]) if is_name(part) and part not in wanted))
        self._apply(models)

    async def poll(self, interval_s: float) -> None:
        """Looks for changes until it is cancelled."""
        while True:
            await asyncio.sleep(interval_s)
            try:
                names = await asyncio.to_thread(model_names, self._root)
                self._apply([await asyncio.to_thread(read_model, self._root, name) for name in names])
            except OSError as error:
                _log.error("cannot read the model repository, serving what was there", error=error.strerror)
            except Exception:
                # Nobody waits for this task: it would end unseen.
                _log.exception("unexpected error while looking at the model repository, serving what was there")

    async def load(self, model: str, config_json: str | None, files: Mapping[str, bytes]) -> None:
        """Loads or reloads a model; returns when all its versions are READY. Raises as `ModelControl.load`."""
        self._check_explicit()
        if not is_name(model):
            raise InvalidFieldError.of("model_name", f"expected the name of a model's folder; got {model[:80]!r}")
        if files and config_json is None:
            raise InvalidFieldError.of("parameters", "expected 'config' beside uploaded files")
        await self._whole(self._load(model, config_json, files, (model,)))

    async def _load(
        self, model: str, config_json: str | None, files: Mapping[str, bytes], path: tuple[str, ...]
    ) -> None:
        """Loads a model, and before it what it is made of. `path` are the ensembles that asked for it, and itself."""
        upload = await self._uploads.keep(model, files) if files else None
        try:
            versions = await self._prepare(model, config_json, upload, path)
        except BaseException:
            if upload is not None:
                await self._uploads.discard(upload)
            raise
        async with self._turn(model):
            await self._uploads.adopt(model, upload)
            await self._replace(model, versions)

    async def _prepare(
        self, model: str, config_json: str | None, upload: Path | None, path: tuple[str, ...]
    ) -> Sequence[WantedVersion]:
        """The versions that a load is of, with everything loaded that they are made of."""
        read = await self._read(model, config_json, upload)
        if read.problem:
            raise _failed(model, read.problem)
        for part in sorted(_parts(read)):
            if part in path:
                raise _failed(model, f"it is part of itself: {' → '.join((*path, part))}.")
            if not is_name(part):
                raise _failed(model, f"{part[:80]!r}, which it is made of, is not the name of a model's folder.")
            if not self._repository.wanted(part):
                await self._load(part, None, {}, (*path, part))
        return self._wanted(read)

    async def _replace(self, model: str, versions: Sequence[WantedVersion]) -> None:
        """Serves these versions in place of those before, or those before if one of these fails, and raises then."""
        before = [held.wanted for held in await self._repository.model_settled(model) if held.state is State.READY]
        if model not in self._unloads:
            self._repository.apply_model(model, versions)
        settled = await self._repository.model_settled(model)
        if not self._repository.wanted(model):
            raise _failed(model, "it was unloaded while it loaded.")
        failed = [held for held in settled if held.state is State.FAILED]
        if not failed:
            self._problems.pop(model, None)
            return
        reasons = "; ".join(f"version {held.number}: {held.message}" for held in failed)
        # A FAILED version is not held on to: the next load is another try, whatever it is of.
        self._repository.apply_model(model, before or [held.wanted for held in settled if held.state is State.READY])
        if not self._repository.wanted(model):
            await self._uploads.adopt(model, None)
        await self._remember(model, reasons)
        raise _failed(model, reasons)

    async def unload(self, model: str, unload_dependents: bool) -> None:
        """Unloads a model; returns when its memory has been given back. Raises as `ModelControl.unload`."""
        self._check_explicit()
        versions = self._repository.versions(model) if model else []
        if not versions:
            raise UnknownModelError(model, "", "It is not loaded.")
        parts = self._parts(model) if unload_dependents else frozenset()
        await self._whole(self._unload(model))
        for part in parts:
            if self._repository.wanted(part):
                await self.unload(part, unload_dependents)

    async def _unload(self, model: str) -> None:
        self._unloads[model] += 1
        try:
            # What loads is given up: that load has the turn, and may take any time.
            self._repository.apply_model(model, ())
            async with self._turn(model):
                await self._retire(model)
        finally:
            # Leaves no count of 0 behind.
            self._unloads -= Counter([model])

    async def _retire(self, model: str) -> None:
        self._repository.apply_model(model, ())
        await self._uploads.adopt(model, None)
        await self._remember(model, "unloaded")
        try:
            async with asyncio.timeout(_UNLOAD_LIMIT_S):
                await self._repository.model_gone(model)
        except TimeoutError:
            raise NotReadyError(
                f"Model {model!r} still answers requests after {_UNLOAD_LIMIT_S:g} s; it goes when they have ended."
            ) from None

    async def _whole(self, work: Coroutine[object, object, None]) -> None:
        """A client that hangs up stops nothing half-way: what has begun goes on, and leaves no upload without owner."""
        task = asyncio.create_task(work)
        self._begun.add(task)
        task.add_done_callback(self._begun.discard)
        await asyncio.shield(task)

    async def _remember(self, model: str, problem: str) -> None:
        """Tells the index why a model is not served. Not of uploads: their names are the clients', and have no end."""
        self._problems.pop(model, None)
        if await asyncio.to_thread((self._root / model).is_dir):
            self._problems[model] = problem

    @asynccontextmanager
    async def _turn(self, model: str) -> AsyncIterator[None]:
        """Waits until no other load or unload of a model runs. Nothing is kept of a model that nobody waits for."""
        lock, waiting = self._locks.get(model, (asyncio.Lock(), 0))
        self._locks[model] = (lock, waiting + 1)
        try:
            async with lock:
                yield
        finally:
            _, waiting = self._locks[model]
            self._locks[model] = (lock, waiting - 1)
            if waiting == 1:
                del self._locks[model]

    async def index(self) -> Sequence[IndexEntry]:
        held = index_of(self._repository)
        try:
            names = await asyncio.to_thread(model_names, self._root)
        except OSError as error:
            _log.error("cannot read the model repository", error=error.strerror)
            names = []
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

    async def _read(self, model: str, config_json: str | None, upload: Path | None) -> FolderModel:
        override = None
        if config_json is not None:
            try:
                override = await asyncio.to_thread(parse_config_json, config_json, "The given config")
            except WrongStateError as error:
                return FolderModel(model, (), error.message)
        if upload is not None:
            read = await asyncio.to_thread(read_model, upload, model, override, trusted=False)
            if any(backend_of(one.config) == PYTHON for one in read.versions):
                return FolderModel(model, (), "Python models are run only from the server's own model repository.")
            return read
        if not await asyncio.to_thread((self._root / model).is_dir):
            return FolderModel(model, (), f"there is no folder {model!r} in the model repository.")
        read = await asyncio.to_thread(read_model, self._root, model, override)
        self._warn(read)
        return read

    def _warn(self, model: FolderModel) -> None:
        warn_of_unknown(model.unknown, str(self._root / model.name / CONFIG))

    def _parts(self, model: str) -> frozenset[str]:
        ready = [one for one in self._repository.versions(model) if one.state is State.READY]
        return frozenset(name for one in ready for name in needs(one.config))

    def _apply(self, models: Sequence[FolderModel]) -> None:
        for model in models:
            if model.problem and self._problems.get(model.name) != model.problem:
                _log.error("model cannot be served", model=model.name, error=model.problem)
            if model.unknown != self._unknown.get(model.name):
                self._warn(model)
        self._problems = {model.name: model.problem for model in models if model.problem}
        self._unknown = {model.name: model.unknown for model in models if model.unknown}
        wanted = [version for model in models for version in self._wanted(model)]
        # A model that cannot be read now, half written perhaps, goes on as it was.
        kept = [
            held.wanted
            for name in self._problems
            for held in self._repository.versions(name)
            if held.state is State.READY
        ]
        desired = Desired.of(self._desired.revision, [*wanted, *kept])
        # What failed is tried again when it has changed, not at every look: that would be work without end.
        if desired != self._desired or not desired.revision:
            self._desired = Desired.of(desired.revision + 1, desired.versions)
            self._repository.apply(self._desired)

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


def _failed(model: str, reason: str) -> WrongStateError:
    return WrongStateError(f"failed to load {model!r}: {reason}")


def _parts(model: FolderModel) -> frozenset[str]:
    """The models that it is made of, if it is an ensemble."""
    return frozenset[str]().union(*(needs(version.config) for version in model.versions))


def _cycle(repository: Repository, model: str) -> Sequence[str]:
    """A way from a model through ensembles back to itself; empty if there is none."""
    ways: list[tuple[str, ...]] = [(model,)]
    seen = {model}
    while ways:
        way = ways.pop()
        parts = repository.needs(way[-1])
        if model in parts:
            return (*way, model)
        ways.extend((*way, part) for part in sorted(parts - seen))
        seen |= parts
    return ()
