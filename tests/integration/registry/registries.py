"""Registries to test against: in this process or as a child, and what the tests ask of them."""

import asyncio
import hashlib
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2
from sqlalchemy import create_engine, insert, select

from penstock.api.registry.v1 import (
    artifact_service_pb2,
    artifact_service_pb2_grpc,
    deployment_service_pb2_grpc,
    registry_service_pb2,
    registry_service_pb2_grpc,
)
from penstock.api.registry.v1.model_pb2 import Version
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.api.types.v1.signature_pb2 import Dimension, Signature, TensorSpec
from penstock.registry.app import application
from penstock.registry.settings import RegistrySettings
from penstock.registry.tables import Audit, Base
from penstock.rpc.server import listening

GRAPH = b"the bytes of a graph"

_CHILD = """
import asyncio, json, sys
from penstock.registry.app import application
from penstock.registry.settings import RegistrySettings
from penstock.rpc.server import serve
settings = RegistrySettings.load(json.loads(sys.argv[1]))
asyncio.run(serve(settings, application(settings)))
"""


@dataclass(frozen=True)
class Registry:
    """The stubs of one registry."""

    models: Any
    deployments: Any
    artifacts: Any

    @classmethod
    def over(cls, channel: grpc.aio.Channel) -> "Registry":
        return cls(
            registry_service_pb2_grpc.RegistryServiceStub(channel),
            deployment_service_pb2_grpc.DeploymentServiceStub(channel),
            artifact_service_pb2_grpc.ArtifactServiceStub(channel),
        )

    async def model(self, name: str = "digits", versions: int = 0) -> str:
        """Creates a model with versions that all have the same content."""
        await self.models.CreateModel(registry_service_pb2.CreateModelRequest(model={"name": name}))
        for _ in range(versions):
            await self.version(name)
        return name

    async def version(self, model: str = "digits", request_id: str = "", **fields: Any) -> Version:
        """Registers a version whose graph it stores first."""
        await self.store(GRAPH)
        request = registry_service_pb2.CreateVersionRequest(version=described(model, **fields), request_id=request_id)
        return (await self.models.CreateVersion(request)).version

    async def store(self, data: bytes) -> Blob:
        """Writes a blob."""
        blob = blob_of(data)
        header = artifact_service_pb2.WriteHeader(blob=blob)
        requests = [artifact_service_pb2.WriteRequest(header=header), artifact_service_pb2.WriteRequest(chunk=data)]
        await self.artifacts.Write(requests)
        return blob

    async def stored(self, digest: str) -> bytes:
        """A blob's bytes."""
        chunks = self.artifacts.Read(artifact_service_pb2.ReadRequest(digest=digest))
        return b"".join([chunk.data async for chunk in chunks])

    async def alias(self, name: str, version: int, model: str = "digits", **fields: Any) -> None:
        request = registry_service_pb2.SetAliasRequest(model=model, alias=name, version=version, **fields)
        await self.models.SetAlias(request)


@asynccontextmanager
async def served(home: Path, **settings: object) -> AsyncIterator[Registry]:
    """A registry in this process, over a real connection."""
    async with serving(home, **settings) as address, connected(address) as registry:
        yield registry


@asynccontextmanager
async def serving(home: Path, **settings: object) -> AsyncIterator[str]:
    """The address of a registry in this process."""
    loaded = RegistrySettings.load({"home": home, "port": 0, "drain_s": 5.0, **settings})
    async with application(loaded) as app, listening(loaded, app) as address:
        yield address


@asynccontextmanager
async def connected(address: str) -> AsyncIterator[Registry]:
    async with grpc.aio.insecure_channel(address) as channel:
        yield Registry.over(channel)


class Child:
    """A registry as a process of its own."""

    def __init__(self, home: Path) -> None:
        self._ready = home / "ready"
        self._ready.unlink(missing_ok=True)
        flags = f'{{"home": "{home}", "port": 0, "ready_file": "{self._ready}", "log_level": "warning"}}'
        self.process = subprocess.Popen([sys.executable, "-c", _CHILD, flags])

    async def address(self) -> str:
        while not self._ready.exists():
            assert self.process.poll() is None, "it ended before it was ready"
            await asyncio.sleep(0.02)
        return self._ready.read_text()

    def kill(self) -> None:
        """Ends it without a chance to do anything more."""
        self.process.kill()
        self.process.wait()


def blob_of(data: bytes) -> Blob:
    return Blob(digest=f"sha256:{hashlib.sha256(data).hexdigest()}", size_bytes=len(data))


def described(model: str = "digits", **fields: Any) -> Version:
    """A version that can be registered, with some of its fields replaced."""
    signature = Signature(
        inputs=[TensorSpec(name="image", datatype="FP32", shape=[Dimension(name="batch"), Dimension(size=64)])],
        outputs=[TensorSpec(name="digit", datatype="FP32", shape=[Dimension(name="batch"), Dimension(size=10)])],
    )
    return Version(**{"model": model, "files": {"model.onnx": blob_of(GRAPH)}, "signature": signature, **fields})


async def refusal(call: Awaitable[object]) -> tuple[grpc.StatusCode, str, list[str]]:
    """The code and text that a call fails with, and the fields it names."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    error = caught.value
    trailers = dict(error.trailing_metadata() or ())
    status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
    bad = error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(bad)
    return error.code(), error.details() or "", [violation.field for violation in bad.field_violations]


def insert_rows(home: Path, table: type[Base], rows: list[dict[str, Any]]) -> None:
    """Writes into a registry's tables what would take too many calls."""
    engine = create_engine(f"sqlite:///{home}/registry/registry.db")
    with engine.begin() as connection:
        connection.execute(insert(table), rows)
    engine.dispose()


def audit_rows(home: Path) -> list[tuple[str, str, dict[str, Any] | None, dict[str, Any] | None, str | None]]:
    """Every audit record as (action, resource, before, after, request id), oldest first."""
    engine = create_engine(f"sqlite:///{home}/registry/registry.db")
    columns = (Audit.action, Audit.resource, Audit.before, Audit.after, Audit.request_id)
    with engine.connect() as connection:
        rows = [tuple(row) for row in connection.execute(select(*columns).order_by(Audit.id))]
    engine.dispose()
    return rows
