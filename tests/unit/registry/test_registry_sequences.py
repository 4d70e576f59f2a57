"""Any sequence of changes leaves what a simple model of the registry says."""

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from penstock.api.registry.v1 import deployment_service_pb2, model_pb2
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.registry import aliases, deployments, models, tables, versions
from penstock.registry.app import MIGRATIONS
from penstock.registry.desired import read_state
from penstock.registry.store import Store
from penstock.rpc.errors import ConflictError, InUseError, NotFoundError, PenstockError
from penstock.storage.blobs import BlobStore
from penstock.storage.database import opened_database, sqlite_url

NUMBERS = st.integers(1, 4)
ALIASES = st.sampled_from(["champion", "challenger"])
TARGETS = st.one_of(NUMBERS, ALIASES)
CHANGES = st.one_of(
    st.tuples(st.just("create")),
    st.tuples(st.just("delete"), NUMBERS),
    st.tuples(st.just("alias"), ALIASES, NUMBERS, st.one_of(st.none(), st.integers(0, 4))),
    st.tuples(st.just("unalias"), ALIASES),
    st.tuples(st.just("deploy"), TARGETS, TARGETS),
    st.tuples(st.just("withdraw")),
)


class Model:
    """What a registry with one model does, without a database."""

    def __init__(self) -> None:
        self.latest = 0
        self.versions: set[int] = set()
        self.aliases: dict[str, int] = {}
        self.moves: list[tuple[str, int, int]] = []
        self.deployed: tuple[int | str, ...] = ()
        self.revision = 0

    def create(self) -> None:
        self.latest += 1
        self.versions.add(self.latest)

    def delete(self, number: int) -> None:
        if number not in self.versions:
            raise NotFoundError("version", "")
        if number in self.aliases.values() or number in self.deployed:
            raise InUseError("")
        self.versions.remove(number)

    def alias(self, name: str, number: int, expected: int | None) -> None:
        if number not in self.versions:
            raise NotFoundError("version", "")
        now_at = self.aliases.get(name, 0)
        if expected is not None and expected != now_at:
            raise ConflictError("")
        if now_at != number:
            self.aliases[name] = number
            self.moves.append((name, now_at, number))
            self.revision += name in self.deployed

    def unalias(self, name: str) -> None:
        if name not in self.aliases:
            raise NotFoundError("alias", "")
        if name in self.deployed:
            raise InUseError("")
        self.moves.append((name, self.aliases.pop(name), 0))

    def deploy(self, *targets: int | str) -> None:
        if any(target not in self.versions and target not in self.aliases for target in targets):
            raise NotFoundError("version or alias", "")
        if targets != self.deployed:
            self.deployed = targets
            self.revision += 1

    def withdraw(self) -> None:
        if not self.deployed:
            raise NotFoundError("deployment", "")
        self.deployed = ()
        self.revision += 1

    @property
    def desired(self) -> dict[int, int]:
        weights: dict[int, int] = {}
        for target in self.deployed:
            number = target if isinstance(target, int) else self.aliases[target]
            weights[number] = weights.get(number, 0) + 50
        return weights


class Registry:
    """The same changes, on the real one."""

    def __init__(self, store: Store, blobs: BlobStore) -> None:
        self._store = store
        self._blobs = blobs

    async def prepare(self) -> None:
        async with self._store.change() as change:
            await models.create(change, "m", "")

    async def create(self) -> None:
        graph = await self._blobs.write(b"graph")
        version = model_pb2.Version(
            model="m", files={"model.onnx": Blob(digest=graph.digest, size_bytes=graph.size_bytes)}
        )
        async with self._store.change() as change:
            await versions.create(change, self._blobs, version, "")

    async def delete(self, number: int) -> None:
        async with self._store.change() as change:
            digests = await versions.remove(change, "m", number)
        await versions.discard_unused(self._store, self._blobs, digests)

    async def alias(self, name: str, number: int, expected: int | None) -> None:
        async with self._store.change() as change:
            await aliases.move(change, "m", name, number, expected=expected, reason="")

    async def unalias(self, name: str) -> None:
        async with self._store.change() as change:
            await aliases.remove(change, "m", name, "")

    async def deploy(self, *targets: int | str) -> None:
        wanted = deployment_service_pb2.Deployment(model="m")
        for target in targets:
            kind = "version" if isinstance(target, int) else "alias"
            wanted.targets.add(weight=50, **{kind: target})
        async with self._store.change() as change:
            await deployments.put(change, wanted)

    async def withdraw(self) -> None:
        async with self._store.change() as change:
            await deployments.remove(change, "m")

    async def check(self, model: Model) -> None:
        async with self._store.snapshot() as session:
            held = {row.number: row.message() for row in await session.scalars(select(tables.Version))}
            assert set(held) == model.versions
            assert {row.name: row.version for row in await session.scalars(select(tables.Alias))} == model.aliases
            moves = await session.scalars(select(tables.AliasMove).order_by(tables.AliasMove.id))
            assert [(move.alias, move.from_version, move.to_version) for move in moves] == model.moves
            state = await read_state(session)
            assert state.revision == model.revision
            shares = {desired.version.number: desired.weight for each in state.models for desired in each.versions}
            assert shares == model.desired
        for version in held.values():
            for blob in version.files.values():
                assert await self._blobs.size(blob.digest) == blob.size_bytes


async def replay(changes: list[tuple[object, ...]], home: Path) -> None:
    model = Model()
    async with opened_database(sqlite_url(home / "registry.db"), MIGRATIONS) as database:
        registry = Registry(Store(database, lambda: None), BlobStore(home))
        await registry.prepare()
        for name, *values in changes:
            with expecting_the_error_of(model, str(name), values):
                await getattr(registry, str(name))(*values)
        await registry.check(model)


@contextlib.contextmanager
def expecting_the_error_of(model: Model, name: str, values: list[object]) -> Iterator[None]:
    try:
        getattr(model, name)(*values)
    except PenstockError as expected:
        with pytest.raises(type(expected)):
            yield
    else:
        yield


@settings(max_examples=25)
@given(st.lists(CHANGES, min_size=5, max_size=25))
def test_any_sequence(changes: list[tuple[object, ...]]) -> None:
    with TemporaryDirectory() as home:
        asyncio.run(replay(changes, Path(home)))
