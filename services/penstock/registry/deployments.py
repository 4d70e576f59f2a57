"""Deployments: what is to be served under a model's name."""

from sqlalchemy import Select, select

from penstock.api.registry.v1 import deployment_service_pb2 as pb
from penstock.registry import tables
from penstock.registry.lookups import find_alias, find_deployment, find_version
from penstock.registry.store import Change


def after(model: str) -> Select[tables.Deployment]:
    """The deployments of the models whose name comes after this one, by model."""
    return select(tables.Deployment).where(tables.Deployment.model > model).order_by(tables.Deployment.model)


async def put(change: Change, wanted: pb.Deployment) -> pb.Deployment:
    """Creates or replaces a model's deployment. Where its targets are these already, nothing is done.

    Raises `NotFoundError` if there is no such model, version or alias.
    """
    for target in wanted.targets:
        if target.WhichOneof("target") == "alias":
            await find_alias(change.session, wanted.model, target.alias)
        else:
            await find_version(change.session, wanted.model, target.version)
    row = await change.session.get(tables.Deployment, wanted.model)
    before = row.message() if row else None
    if before is not None and before.targets == wanted.targets:
        return before
    deployment = pb.Deployment(model=wanted.model, targets=wanted.targets)
    deployment.update_time.FromMicroseconds(tables.now_us())
    if row is None:
        row = tables.Deployment(model=wanted.model)
        change.session.add(row)
    row.content = deployment.SerializeToString()
    change.record("SetDeployment", wanted.model, before, deployment)
    change.advance()
    return deployment


async def remove(change: Change, model: str) -> None:
    """Raises `NotFoundError` if the model has no deployment."""
    row = await find_deployment(change.session, model)
    change.record("DeleteDeployment", model, row.message(), None)
    await change.session.delete(row)
    change.advance()
