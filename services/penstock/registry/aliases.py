"""Aliases and their history."""

from collections.abc import Sequence

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from penstock.api.registry.v1 import model_pb2
from penstock.registry import tables
from penstock.registry.lookups import deployed_targets, find_alias, find_model, find_version
from penstock.registry.store import Change
from penstock.rpc.errors import ConflictError, InUseError, LimitExceededError

MAX_ALIASES = 1000


async def of_model(session: AsyncSession, model: str) -> Sequence[tables.Alias]:
    """A model's aliases by name. Raises `NotFoundError` if there is no such model."""
    await find_model(session, model)
    query = select(tables.Alias).where(tables.Alias.model == model).order_by(tables.Alias.name)
    return (await session.scalars(query)).all()


async def move(
    change: Change, model: str, name: str, number: int, *, expected: int | None, reason: str
) -> model_pb2.Alias:
    """Points an alias at a version. Where it points there already, nothing is done.

    Raises:
        NotFoundError: there is no such model or version.
        ConflictError: the alias is not where it was expected.
        LimitExceededError: the model has as many aliases as it can have.
    """
    await find_version(change.session, model, number)
    row = await change.session.get(tables.Alias, (model, name))
    now_at = row.version if row else 0
    if expected not in (None, now_at):
        raise ConflictError(
            f"The alias {model}/{name} points at version {now_at}, not {expected} (0: at none). "
            f"Read it again, then decide.",
            current_version=str(now_at),
        )
    if row is not None and row.version == number:
        return row.message()
    before = row.message() if row else None
    if row is None:
        await _check_room(change.session, model)
        row = tables.Alias(model=model, name=name)
        change.session.add(row)
    row.version = number
    row.update_time_us = tables.now_us()
    _record_move(change, row, now_at, number, reason)
    change.record("SetAlias", f"{model}/{name}", before, row.message())
    if name in await deployed_targets(change.session, model):
        change.advance()
    return row.message()


async def remove(change: Change, model: str, name: str, reason: str) -> None:
    """Removes an alias; its history stays.

    Raises:
        NotFoundError: there is no such model or alias.
        InUseError: a deployment refers to it.
    """
    row = await find_alias(change.session, model, name)
    if name in await deployed_targets(change.session, model):
        raise InUseError(f"The deployment of {model!r} follows the alias {name!r}. Change the deployment first.")
    _record_move(change, row, row.version, 0, reason)
    change.record("DeleteAlias", f"{model}/{name}", row.message(), None)
    await change.session.delete(row)


async def moves(session: AsyncSession, model: str, name: str, before_id: int) -> Select[tables.AliasMove]:
    """The moves of an alias that came before one of them, newest first.

    Raises `NotFoundError` if the alias has never been.
    """
    query = select(tables.AliasMove).where(tables.AliasMove.model == model, tables.AliasMove.alias == name)
    if await session.scalar(query.limit(1)) is None:
        await find_alias(session, model, name)
    return query.where(tables.AliasMove.id < before_id).order_by(tables.AliasMove.id.desc())


async def _check_room(session: AsyncSession, model: str) -> None:
    count = await session.scalar(select(func.count()).select_from(tables.Alias).where(tables.Alias.model == model))
    if count is not None and count >= MAX_ALIASES:
        raise LimitExceededError(f"The model {model!r} has {count:,} aliases, as many as it can. Delete one first.")


def _record_move(change: Change, alias: tables.Alias, from_version: int, to_version: int, reason: str) -> None:
    change.session.add(
        tables.AliasMove(
            model=alias.model,
            alias=alias.name,
            from_version=from_version,
            to_version=to_version,
            reason=reason,
            time_us=tables.now_us(),
        )
    )
