"""What was acknowledged is there afterwards; what failed left nothing."""

import asyncio
import itertools
import sqlite3
from pathlib import Path

import grpc
import pytest
from structlog.testing import capture_logs
from tests.integration.registry.registries import (
    Child,
    Registry,
    audit_rows,
    connected,
    refusal,
    served,
)

from penstock.api.registry.v1 import deployment_service_pb2
from penstock.api.registry.v1 import registry_service_pb2 as pb
from penstock.rpc.errors import StartupError


async def test_every_change_has_its_audit_record(tmp_path: Path) -> None:
    async with served(tmp_path) as registry:
        await registry.models.CreateModel(
            pb.CreateModelRequest(model={"name": "digits"}), metadata=(("x-request-id", "mine"),)
        )
        await registry.version()
        await registry.alias("champion", 1)
        target = {"alias": "champion", "weight": 100}
        request = deployment_service_pb2.SetDeploymentRequest(deployment={"model": "digits", "targets": [target]})
        await registry.deployments.SetDeployment(request)
        await registry.deployments.DeleteDeployment(deployment_service_pb2.DeleteDeploymentRequest(model="digits"))
        await registry.models.DeleteAlias(pb.DeleteAliasRequest(model="digits", alias="champion"))
        await registry.models.DeleteVersion(pb.DeleteVersionRequest(model="digits", number=1))
        await registry.models.DeleteModel(pb.DeleteModelRequest(name="digits"))

    rows = audit_rows(tmp_path)
    assert [(action, resource, before is None, after is None) for action, resource, before, after, _ in rows] == [
        ("CreateModel", "digits", True, False),
        ("CreateVersion", "digits/1", True, False),
        ("SetAlias", "digits/champion", True, False),
        ("SetDeployment", "digits", True, False),
        ("DeleteDeployment", "digits", False, True),
        ("DeleteAlias", "digits/champion", False, True),
        ("DeleteVersion", "digits/1", False, True),
        ("DeleteModel", "digits", False, True),
    ]
    assert rows[0][4] == "mine"
    assert rows[1][3] == rows[6][2]
    assert rows[3][3] is not None
    assert rows[3][3]["targets"] == [target]


async def test_what_fails_or_does_nothing_leaves_no_record(tmp_path: Path) -> None:
    async with served(tmp_path) as registry:
        await registry.model(versions=1)
        await registry.version(request_id="r")
        await registry.alias("champion", 1)
        count = len(audit_rows(tmp_path))

        await registry.model()
        await registry.version(request_id="r")
        await registry.alias("champion", 1)
        await refusal(registry.alias("champion", 2, expected_version=2))
        await refusal(registry.models.DeleteVersion(pb.DeleteVersionRequest(model="digits", number=1)))
        await refusal(registry.version("absent"))

    assert len(audit_rows(tmp_path)) == count


async def test_a_change_that_cannot_be_recorded_does_not_happen(tmp_path: Path) -> None:
    """The record and the change are one transaction: a database that refuses the one does not keep the other."""
    async with served(tmp_path) as registry:
        await registry.model(versions=1)
        with sqlite3.connect(tmp_path / "registry" / "registry.db") as connection:
            connection.execute("CREATE TRIGGER refuse BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'no'); END")
        connection.close()

        with capture_logs() as logs:
            code, text, _ = await refusal(registry.alias("champion", 1))

        assert [log["event"] for log in logs if log["log_level"] == "error"] == ["unexpected error"]
        assert code == grpc.StatusCode.INTERNAL
        assert "RAISE" not in text
        assert (await registry.models.ListAliases(pb.ListAliasesRequest(model="digits"))).aliases == []


async def test_a_second_server_on_the_same_home(tmp_path: Path) -> None:
    async with served(tmp_path):
        with pytest.raises(StartupError, match="is in use by process"):
            async with served(tmp_path):
                pass


async def test_a_blob_url_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="Cannot open the blob store at blob_url 'nonsense'"):
        async with served(tmp_path, blob_url="nonsense"):
            pass


async def test_a_restart_keeps_everything(tmp_path: Path) -> None:
    async with served(tmp_path) as registry:
        await registry.model()
        made = await registry.version(labels=["zero"])
        await registry.alias("champion", 1, reason="first")
        request = deployment_service_pb2.SetDeploymentRequest(
            deployment={"model": "digits", "targets": [{"alias": "champion", "weight": 100}]}
        )
        await registry.deployments.SetDeployment(request)
        before = await registry.deployments.Watch(deployment_service_pb2.WatchRequest()).read()

    async with served(tmp_path) as registry:
        assert await registry.deployments.Watch(deployment_service_pb2.WatchRequest()).read() == before
        assert (await registry.models.GetVersion(pb.GetVersionRequest(model="digits"))).version == made
        assert await registry.stored(made.bundle_digest)


async def test_a_killed_registry_loses_nothing_acknowledged(tmp_path: Path) -> None:
    acknowledged: list[tuple[int, str]] = []
    reached = asyncio.Event()

    async def change(registry: Registry, worker: int) -> None:
        for step in itertools.count():
            alias = f"w{worker}"
            made = await registry.version(labels=[f"{worker}-{step}"], request_id=f"{worker}-{step}")
            await registry.alias(alias, made.number)
            acknowledged.append((made.number, alias))
            if len(acknowledged) == 40:
                reached.set()

    async def change_until_it_dies(registry: Registry, worker: int) -> None:
        with pytest.raises(grpc.aio.AioRpcError):
            await change(registry, worker)

    child = Child(tmp_path)
    try:
        async with connected(await child.address()) as registry:
            await registry.model()
            workers = asyncio.gather(*(change_until_it_dies(registry, worker) for worker in range(4)))
            await asyncio.wait_for(reached.wait(), 60)
            child.kill()
            await workers
    finally:
        child.kill()

    async with served(tmp_path) as registry:
        listed = await registry.models.ListVersions(pb.ListVersionsRequest(model="digits", page_size=1000))
        numbers = [version.number for version in listed.versions]
        assert numbers == list(range(len(numbers), 0, -1))
        assert {number for number, _ in acknowledged} <= set(numbers)
        for alias in {alias for _, alias in acknowledged}:
            moves = await registry.models.ListAliasMoves(
                pb.ListAliasMovesRequest(model="digits", alias=alias, page_size=1000)
            )
            moved = [number for number, name in acknowledged if name == alias]
            # One move more may have been recorded whose answer never came.
            assert [move.to_version for move in reversed(moves.moves)][: len(moved)] == moved
        for version in listed.versions:
            assert len(await registry.stored(version.bundle_digest)) == version.files["manifest.json"].size_bytes
        audited = [resource for action, resource, *_ in audit_rows(tmp_path) if action == "CreateVersion"]
        assert audited == [f"digits/{number}" for number in reversed(numbers)]
