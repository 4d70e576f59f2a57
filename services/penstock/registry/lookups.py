"""Finding what a request names."""

from collections.abc import Sequence

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from penstock.registry import tables
from penstock.rpc.errors import NotFoundError


async def find_model(session: AsyncSession, name: str) -> tables.Model:
    """Raises `NotFoundError` if there is no such model."""
    row = await session.get(tables.Model, name)
    if row is None:
        raise NotFoundError("model", name, "Create it with CreateModel, or see ListModels for those that are there.")
    return row


async def find_version(session: AsyncSession, model: str, number: int) -> tables.Version:
    """Raises `NotFoundError` if there is no such model or version."""
    row = await session.get(tables.Version, (model, number))
    if row is None:
        await find_model(session, model)
        raise NotFoundError("version", f"{model}/{number}", "See ListVersions for those that are there.")
    return row


async def find_alias(session: AsyncSession, model: str, name: str) -> tables.Alias:
    """Raises `NotFoundError` if there is no such model or alias."""
    row = await session.get(tables.Alias, (model, name))
    if row is None:
        await find_model(session, model)
        raise NotFoundError("alias", f"{model}/{name}", "Set it with SetAlias, or see ListAliases.")
    return row


async def find_deployment(session: AsyncSession, model: str) -> tables.Deployment:
    """Raises `NotFoundError` if the model has no deployment."""
    row = await session.get(tables.Deployment, model)
    if row is None:
        raise NotFoundError("deployment", model, "Make it with SetDeployment.")
    return row


async def deployed_targets(session: AsyncSession, model: str) -> list[int | str]:
    """The versions' numbers and the aliases that the model's deployment names; nothing if it has none."""
    row = await session.get(tables.Deployment, model)
    targets = row.message().targets if row else ()
    return [target.version if target.WhichOneof("target") == "version" else target.alias for target in targets]


async def aliases_of(session: AsyncSession, model: str, number: int) -> Sequence[str]:
    """The names of the aliases that stand for a version."""
    query = select(tables.Alias.name).where(tables.Alias.model == model, tables.Alias.version == number)
    return (await session.scalars(query.order_by(tables.Alias.name))).all()
