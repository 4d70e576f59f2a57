"""Models."""

from sqlalchemy import Select, delete, select

from penstock.api.registry.v1 import model_pb2
from penstock.registry import tables
from penstock.registry.lookups import find_model
from penstock.registry.store import Change
from penstock.rpc.errors import ExistsError, InUseError


def after(name: str) -> Select[tables.Model]:
    """The models whose name comes after this one, by name."""
    return select(tables.Model).where(tables.Model.name > name).order_by(tables.Model.name)


async def create(change: Change, name: str, description: str) -> model_pb2.Model:
    """Creates a model; one that is there with this description is returned as it is.

    Raises `ExistsError` if it is there with another description.
    """
    row = await change.session.get(tables.Model, name)
    if row is None:
        row = tables.Model(name=name, description=description, latest_version=0, create_time_us=tables.now_us())
        change.session.add(row)
        change.record("CreateModel", name, None, row.message())
    elif row.description != description:
        raise ExistsError(
            f"The model {name!r} exists with the description {row.description[:80]!r}. Choose another name, or repeat "
            f"that description.",
            resource_type="model",
            resource_name=name,
        )
    return row.message()


async def remove(change: Change, name: str) -> set[str]:
    """Removes a model with everything under it, and returns the digests its versions referred to.

    Raises:
        NotFoundError: there is no such model.
        InUseError: it has a deployment.
    """
    row = await find_model(change.session, name)
    if await change.session.get(tables.Deployment, name) is not None:
        raise InUseError(f"The model {name!r} has a deployment. Call DeleteDeployment first.")
    change.record("DeleteModel", name, row.message(), None)
    digests = await change.session.scalars(select(tables.VersionBlob.digest).where(tables.VersionBlob.model == name))
    for table in (tables.AliasMove, tables.Alias, tables.VersionBlob, tables.Version):
        await change.session.execute(delete(table).where(table.model == name))
    await change.session.delete(row)
    return set(digests)
