"""Deployments and their watch, through the wire."""

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
from tests.integration.registry.registries import Registry, connected, refusal, served, serving

from penstock.api.registry.v1 import deployment_service_pb2 as pb
from penstock.api.registry.v1 import registry_service_pb2

State = list[tuple[str, list[tuple[int, int]]]]


async def deploy(registry: Registry, *targets: dict[str, object], model: str = "digits") -> pb.Deployment:
    deployment = pb.Deployment(model=model, targets=[pb.DeploymentTarget(**target) for target in targets])
    return (await registry.deployments.SetDeployment(pb.SetDeploymentRequest(deployment=deployment))).deployment


async def withdraw(registry: Registry, model: str = "digits") -> None:
    await registry.deployments.DeleteDeployment(pb.DeleteDeploymentRequest(model=model))


def state_of(response: pb.WatchResponse) -> State:
    return [
        (model.model, [(desired.version.number, desired.weight) for desired in model.versions])
        for model in response.models
    ]


async def test_sets_gets_replaces_and_deletes(registry: Registry) -> None:
    await registry.model(versions=2)
    await registry.alias("champion", 1)

    first = await deploy(registry, {"version": 2, "weight": 30}, {"alias": "champion", "weight": 70})

    assert first.update_time.seconds > 0
    request = pb.GetDeploymentRequest(model="digits")
    assert (await registry.deployments.GetDeployment(request)).deployment == first
    assert await deploy(registry, {"version": 2, "weight": 30}, {"alias": "champion", "weight": 70}) == first
    second = await deploy(registry, {"version": 2, "weight": 100})
    assert (await registry.deployments.GetDeployment(request)).deployment == second
    await withdraw(registry)
    for call in (registry.deployments.GetDeployment(request), withdraw(registry)):
        code, text, _ = await refusal(call)
        assert code == grpc.StatusCode.NOT_FOUND
        assert "deployment 'digits'" in text


async def test_names_must_be_there(registry: Registry) -> None:
    await registry.model(versions=1)

    for model, target, missing in (
        ("absent", {"version": 1}, "model 'absent'"),
        ("digits", {"version": 2}, "version 'digits/2'"),
        ("digits", {"alias": "champion"}, "alias 'digits/champion'"),
    ):
        code, text, _ = await refusal(deploy(registry, {**target, "weight": 100}, model=model))
        assert code == grpc.StatusCode.NOT_FOUND
        assert missing in text


async def test_what_is_deployed_cannot_be_deleted(registry: Registry) -> None:
    await registry.model(versions=3)
    await registry.alias("champion", 1)
    await registry.alias("spare", 3)
    await deploy(registry, {"alias": "champion", "weight": 50}, {"version": 2, "weight": 50})

    models = registry.models
    for call in (
        models.DeleteModel(registry_service_pb2.DeleteModelRequest(name="digits")),
        models.DeleteVersion(registry_service_pb2.DeleteVersionRequest(model="digits", number=2)),
        models.DeleteAlias(registry_service_pb2.DeleteAliasRequest(model="digits", alias="champion")),
    ):
        code, text, _ = await refusal(call)
        assert code == grpc.StatusCode.FAILED_PRECONDITION
        assert "deployment" in text
    await models.DeleteAlias(registry_service_pb2.DeleteAliasRequest(model="digits", alias="spare"))
    await models.DeleteVersion(registry_service_pb2.DeleteVersionRequest(model="digits", number=3))


async def test_lists_by_model_in_pages(registry: Registry) -> None:
    for name in ("c", "a", "b"):
        await registry.model(name, versions=1)
        await deploy(registry, {"version": 1, "weight": 100}, model=name)

    first = await registry.deployments.ListDeployments(pb.ListDeploymentsRequest(page_size=2))
    rest = await registry.deployments.ListDeployments(
        pb.ListDeploymentsRequest(page_size=2, page_token=first.next_page_token)
    )

    assert [deployment.model for deployment in first.deployments] == ["a", "b"]
    assert [deployment.model for deployment in rest.deployments] == ["c"]
    assert rest.next_page_token == ""


async def test_watch_sends_the_state_and_every_change(registry: Registry) -> None:
    await registry.model(versions=3)
    await registry.model("others", versions=1)
    await registry.alias("champion", 1)
    states = registry.deployments.Watch(pb.WatchRequest())
    revisions: list[int] = []

    async def next_state() -> State:
        response = await asyncio.wait_for(states.read(), 10)
        revisions.append(response.revision)
        return state_of(response)

    assert await next_state() == []
    await deploy(
        registry, {"alias": "champion", "weight": 60}, {"version": 3, "weight": 30}, {"version": 1, "weight": 10}
    )
    assert await next_state() == [("digits", [(1, 70), (3, 30)])]
    await registry.alias("champion", 2)
    assert await next_state() == [("digits", [(2, 60), (3, 30), (1, 10)])]
    # Nothing of this is seen by an inference server; the next state is that of the last change.
    await registry.alias("unused", 3)
    await registry.version()
    await deploy(registry, {"version": 1, "weight": 100}, model="others")
    assert await next_state() == [("digits", [(2, 60), (3, 30), (1, 10)]), ("others", [(1, 100)])]
    await withdraw(registry)
    assert await next_state() == [("others", [(1, 100)])]

    assert revisions == [0, 1, 2, 3, 4]


async def test_watch_carries_whole_versions(registry: Registry) -> None:
    await registry.model()
    made = await registry.version(labels=["zero", "one"])
    await deploy(registry, {"version": 1, "weight": 100})

    response = await registry.deployments.Watch(pb.WatchRequest()).read()

    assert response.models[0].versions[0].version == made


async def test_a_slow_watcher_gets_the_newest_state_only(registry: Registry) -> None:
    """States of a megabyte fill the connection's window; those replaced in the meantime are passed over."""
    await registry.model()
    for _ in range(2):
        await registry.version(labels=["l" * 90] * 10_000)
    states = registry.deployments.Watch(pb.WatchRequest())
    await states.read()

    changes = 60
    for change in range(changes):
        await deploy(registry, {"version": 1 + change % 2, "weight": 100})
    received: list[int] = []
    while not received or received[-1] < changes:
        received.append((await asyncio.wait_for(states.read(), 10)).revision)

    assert received == sorted(received)
    assert len(received) < changes


async def test_watch_ends_when_the_registry_stops(tmp_path: Path) -> None:
    loop = asyncio.get_running_loop()
    async with AsyncExitStack() as clients:
        async with serving(tmp_path, drain_s=30.0) as address:
            registry = await clients.enter_async_context(connected(address))
            states = registry.deployments.Watch(pb.WatchRequest())
            await states.read()
            stopping_since = loop.time()
        assert loop.time() - stopping_since < 10

        code, text, _ = await refusal(states.read())

    assert code == grpc.StatusCode.UNAVAILABLE
    assert "shutting down" in text


async def test_registries_that_share_a_database(tmp_path: Path) -> None:
    """What one changes, watchers of the other see; and their changes never mix."""
    (tmp_path / "blobs").mkdir()
    shared = {
        "database_url": f"sqlite+aiosqlite:///{tmp_path}/shared.db",
        "blob_url": f"file://{tmp_path}/blobs",
    }
    async with served(tmp_path / "a", **shared) as one, served(tmp_path / "b", **shared) as other:
        await one.model(versions=1)
        states = other.deployments.Watch(pb.WatchRequest())
        assert state_of(await states.read()) == []

        await deploy(one, {"version": 1, "weight": 100})
        assert state_of(await asyncio.wait_for(states.read(), 10)) == [("digits", [(1, 100)])]

        made = await asyncio.gather(*(registry.version() for _ in range(8) for registry in (one, other)))
        assert sorted(version.number for version in made) == list(range(2, 18))
