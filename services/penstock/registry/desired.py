"""The desired state that inference servers follow."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

import structlog
from sqlalchemy import select, tuple_
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from penstock.api.registry.v1 import deployment_service_pb2 as pb
from penstock.api.registry.v1.model_pb2 import Version
from penstock.registry import tables
from penstock.registry.store import STATE_ID
from penstock.rpc.errors import NotReadyError
from penstock.storage.database import Database

# A change made by another registry on the same database is seen after this long.
POLL_S = 1.0

# SQLite binds at most 32,766 values a statement; a version's key takes two.
_KEYS_A_QUERY = 5000

_log = structlog.get_logger("penstock.registry")


class DesiredState:
    """Tells watchers of the desired state as it changes.

    Only the newest state counts: a watcher that is slow, or whose registry was told late, misses what was in between
    and nothing else.
    """

    def __init__(self, database: Database) -> None:
        self._database = database
        self._changed = asyncio.Event()
        self._draining = False

    def wake(self) -> None:
        """Lets every watcher look whether there is a new revision."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def drain(self) -> None:
        """Ends every watch."""
        self._draining = True
        self.wake()

    async def watch(self) -> AsyncIterator[pb.WatchResponse]:
        """The state now, then the newest one whenever it has changed.

        Raises `NotReadyError` when the registry shuts down.
        """
        sent = -1
        while True:
            # Taken before the state is read: a change that comes after the reading sets this very event.
            changed = self._changed
            if self._draining:
                raise NotReadyError("The registry is shutting down. Watch again in a moment.")
            async with self._database.snapshot() as session:
                state = await read_state(session) if await _revision(session) != sent else None
            if state is None:
                await changed.wait()
            else:
                sent = state.revision
                yield state

    @asynccontextmanager
    async def polling(self) -> AsyncIterator[None]:
        """Wakes the watchers also when another process has changed the database."""
        task = asyncio.create_task(self._poll())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _poll(self) -> None:
        known = -1
        while True:
            try:
                async with self._database.snapshot() as session:
                    revision = await _revision(session)
            except (SQLAlchemyError, OSError) as error:
                _log.warning("revision cannot be read", error=str(error))
            else:
                if revision != known:
                    known = revision
                    self.wake()
            await asyncio.sleep(POLL_S)


async def read_state(session: AsyncSession) -> pb.WatchResponse:
    """Every deployment by model, its aliases resolved, and the revision."""
    revision = await _revision(session)
    rows = await session.scalars(select(tables.Deployment).order_by(tables.Deployment.model))
    deployments = [row.message() for row in rows]
    numbers = await _alias_numbers(session)
    weights = {deployment.model: _weights(deployment, numbers) for deployment in deployments}
    versions = await _versions(session, ((model, number) for model, shares in weights.items() for number in shares))
    return pb.WatchResponse(
        revision=revision,
        models=[
            pb.DesiredModel(
                model=model,
                versions=[
                    pb.DesiredVersion(version=versions[model, number], weight=weight)
                    for number, weight in shares.items()
                ],
            )
            for model, shares in weights.items()
        ],
    )


async def _revision(session: AsyncSession) -> int:
    return (await session.scalars(select(tables.State.revision).where(tables.State.id == STATE_ID))).one()


async def _alias_numbers(session: AsyncSession) -> dict[tuple[str, str], int]:
    """Where the aliases of deployed models point."""
    query = select(tables.Alias).join(tables.Deployment, tables.Deployment.model == tables.Alias.model)
    return {(alias.model, alias.name): alias.version for alias in await session.scalars(query)}


def _weights(deployment: pb.Deployment, alias_numbers: dict[tuple[str, str], int]) -> dict[int, int]:
    """The weight of each version, in the order of the targets that first name it."""
    weights: dict[int, int] = {}
    for target in deployment.targets:
        is_alias = target.WhichOneof("target") == "alias"
        number = alias_numbers[deployment.model, target.alias] if is_alias else target.version
        weights[number] = weights.get(number, 0) + target.weight
    return weights


async def _versions(session: AsyncSession, keys: Iterable[tuple[str, int]]) -> dict[tuple[str, int], Version]:
    wanted = list(keys)
    found: dict[tuple[str, int], Version] = {}
    for start in range(0, len(wanted), _KEYS_A_QUERY):
        chosen = tuple_(tables.Version.model, tables.Version.number).in_(wanted[start : start + _KEYS_A_QUERY])
        for row in await session.scalars(select(tables.Version).where(chosen)):
            found[row.model, row.number] = row.message()
    return found
