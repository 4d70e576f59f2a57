"""Transactions of the registry: a change, its audit record and the revision are one."""

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message
from sqlalchemy.ext.asyncio import AsyncSession
from structlog.contextvars import get_contextvars

from penstock.registry.tables import Audit, State, now_us
from penstock.storage.database import Database

STATE_ID = 1


class Change:
    """One transaction that changes the registry."""

    def __init__(self, session: AsyncSession, state: State) -> None:
        self.session = session
        self._state = state

    def record(self, action: str, resource: str, before: Message | None, after: Message | None) -> None:
        """Writes the audit record of what this transaction does to a resource."""
        self.session.add(
            Audit(
                time_us=now_us(),
                request_id=get_contextvars().get("request_id"),
                action=action,
                resource=resource,
                before=_as_json(before),
                after=_as_json(after),
            )
        )

    def advance(self) -> None:
        """Says that inference servers can see what this transaction changes."""
        self._state.revision += 1


class Store:
    """Begins the registry's transactions; `changed` is called after each change."""

    def __init__(self, database: Database, changed: Callable[[], None]) -> None:
        self._database = database
        self._changed = changed

    def snapshot(self) -> AbstractAsyncContextManager[AsyncSession]:
        """A consistent view for reading."""
        return self._database.snapshot()

    @asynccontextmanager
    async def change(self) -> AsyncIterator[Change]:
        """A change: alone in the database, durable when the block has ended, undone if it raises."""
        try:
            async with self._database.transaction() as session:
                yield Change(session, await session.get_one(State, STATE_ID, with_for_update=True))
        finally:
            # Even after an error: a call that was cut off while it committed has changed something all the same.
            self._changed()


def _as_json(message: Message | None) -> dict[str, object] | None:
    return None if message is None else MessageToDict(message, preserving_proto_field_name=True)
