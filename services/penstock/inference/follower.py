"""Follows the registry's desired state, and keeps the last one for a start without the registry."""

import asyncio
import os
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import structlog
from google.protobuf.message import DecodeError

from penstock.api.registry.v1.deployment_service_pb2 import WatchRequest, WatchResponse
from penstock.inference.backoff import delays_s
from penstock.inference.loader import RegistryLoader
from penstock.inference.repository import Repository
from penstock.inference.wanted import Desired, WantedVersion

if TYPE_CHECKING:
    from penstock.api.registry.v1.deployment_service_pb2_grpc import DeploymentServiceAsyncStub

_log = structlog.get_logger("penstock.inference.follower")


class Follower:
    """Applies every desired state that the registry streams to the repository, across broken connections."""

    def __init__(
        self, registry: "DeploymentServiceAsyncStub", repository: Repository, loader: RegistryLoader, path: Path
    ) -> None:
        """`path` is the file that keeps the last desired state."""
        self._registry = registry
        self._repository = repository
        self._loader = loader
        self._path = path

    def restore(self) -> None:
        """Applies the desired state that was seen last, if there is one."""
        try:
            desired = WatchResponse.FromString(self._path.read_bytes())
        except FileNotFoundError:
            return
        except DecodeError as error:
            _log.warning(
                "the kept desired state is corrupted, waiting for the registry", path=str(self._path), error=str(error)
            )
            return
        _log.info("desired state restored", revision=desired.revision, models=len(desired.models))
        self._repository.apply(self._desired(desired))

    async def run(self) -> None:
        """Follows until it is cancelled."""
        delays = delays_s()
        while True:
            try:
                async for desired in self._registry.Watch(WatchRequest()):
                    delays = delays_s()
                    await self._follow(desired)
                _log.warning("the registry ended the stream of desired states, following again")
            except grpc.aio.AioRpcError as error:
                _log.warning(
                    "the registry cannot be followed, serving what was deployed last; trying again",
                    code=error.code().name,
                    error=error.details(),
                )
            except Exception:
                # Without its follower the server would serve yesterday's versions for ever, and look healthy.
                _log.exception("unexpected error while following the registry, trying again")
            await asyncio.sleep(next(delays))

    async def _follow(self, desired: WatchResponse) -> None:
        _log.info("desired state", revision=desired.revision, models=len(desired.models))
        self._repository.apply(self._desired(desired))
        try:
            await asyncio.to_thread(_replace, self._path, desired.SerializeToString())
        except OSError as error:
            _log.error("cannot keep the desired state: a restart needs the registry", error=error.strerror)

    def _desired(self, message: WatchResponse) -> Desired:
        return Desired.of(
            message.revision,
            (
                WantedVersion(
                    one.version.model,
                    one.version.number,
                    one.version.bundle_digest,
                    one.weight,
                    self._loader.source(one.version),
                )
                for model in message.models
                for one in model.versions
            ),
        )


def _replace(path: Path, data: bytes) -> None:
    """After a crash at any point the file is the old one or the new one."""
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
