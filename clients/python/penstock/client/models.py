"""Models, their versions and aliases, in the registry."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import grpc

from penstock.api.registry.v1 import artifact_service_pb2_grpc, model_pb2, registry_service_pb2_grpc
from penstock.api.registry.v1 import registry_service_pb2 as pb
from penstock.client.artifacts import Progress, read_blob, unobserved, write_blob
from penstock.client.errors import answer
from penstock.client.pages import all_pages

if TYPE_CHECKING:
    from penstock.api.registry.v1.artifact_service_pb2_grpc import ArtifactServiceAsyncStub
    from penstock.api.registry.v1.registry_service_pb2_grpc import RegistryServiceAsyncStub

# The contract's rule for names in a bundle. A registry is a stranger too: its names must not lead out of a folder.
FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,199}")


class AsyncModels:
    """The RegistryService, with the files of bundles. Every method raises `PenstockError`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: RegistryServiceAsyncStub = registry_service_pb2_grpc.RegistryServiceStub(channel)
        self._artifacts: ArtifactServiceAsyncStub = artifact_service_pb2_grpc.ArtifactServiceStub(channel)

    async def create(self, name: str, description: str = "") -> model_pb2.Model:
        model = model_pb2.Model(name=name, description=description)
        return (await answer(self._stub.CreateModel(pb.CreateModelRequest(model=model)))).model

    async def get(self, name: str) -> model_pb2.Model:
        return (await answer(self._stub.GetModel(pb.GetModelRequest(name=name)))).model

    async def list(self) -> Sequence[model_pb2.Model]:
        """All models, by name."""
        call = self._stub.ListModels
        return await all_pages(
            lambda token: call(pb.ListModelsRequest(page_size=1000, page_token=token)), lambda page: page.models
        )

    async def delete(self, name: str) -> None:
        """Deletes a model with its versions and aliases."""
        await answer(self._stub.DeleteModel(pb.DeleteModelRequest(name=name)))

    async def create_version(
        self,
        version: model_pb2.Version,
        files: Mapping[str, Path],
        request_id: str = "",
        progress: Progress = unobserved,
    ) -> model_pb2.Version:
        """Uploads the files of a bundle, `model.onnx` among them, and registers it under `version.model`."""
        complete = model_pb2.Version()
        complete.CopyFrom(version)
        for name, path in files.items():
            complete.files[name].CopyFrom(await write_blob(self._artifacts, path, progress))
        request = pb.CreateVersionRequest(version=complete, request_id=request_id)
        return (await answer(self._stub.CreateVersion(request))).version

    async def get_version(self, model: str, number: int | None = None, alias: str | None = None) -> model_pb2.Version:
        """A version by its number or by an alias; without either, the newest one."""
        request = pb.GetVersionRequest(model=model)
        if number is not None:
            request.number = number
        elif alias is not None:
            request.alias = alias
        return (await answer(self._stub.GetVersion(request))).version

    async def list_versions(self, model: str) -> Sequence[model_pb2.Version]:
        """The versions of a model, newest first."""
        call = self._stub.ListVersions
        return await all_pages(
            lambda token: call(pb.ListVersionsRequest(model=model, page_size=1000, page_token=token)),
            lambda page: page.versions,
        )

    async def delete_version(self, model: str, number: int) -> None:
        await answer(self._stub.DeleteVersion(pb.DeleteVersionRequest(model=model, number=number)))

    async def download(self, version: model_pb2.Version, folder: Path, progress: Progress = unobserved) -> None:
        """Fetches the files of a version into an existing folder; each appears only when its digest agrees.

        Raises `ValueError`, before anything is fetched, if a name is not a plain file name.
        """
        for name in version.files:
            if not FILE_NAME.fullmatch(name):
                raise ValueError(
                    f"{version.model} version {version.number} has a file named {name!r}; it is not fetched."
                )
        for name, blob in version.files.items():
            await read_blob(self._artifacts, blob, folder / name, progress)

    async def set_alias(
        self, model: str, alias: str, version: int, reason: str = "", expected_version: int | None = None
    ) -> model_pb2.Alias:
        """Points an alias at a version. With `expected_version`, only if it points there now (0: nowhere)."""
        request = pb.SetAliasRequest(
            model=model, alias=alias, version=version, reason=reason, expected_version=expected_version
        )
        return (await answer(self._stub.SetAlias(request))).alias

    async def list_aliases(self, model: str) -> Sequence[model_pb2.Alias]:
        return list((await answer(self._stub.ListAliases(pb.ListAliasesRequest(model=model)))).aliases)

    async def list_alias_moves(self, model: str, alias: str) -> Sequence[model_pb2.AliasMove]:
        """The history of an alias, newest first."""
        call = self._stub.ListAliasMoves
        return await all_pages(
            lambda token: call(pb.ListAliasMovesRequest(model=model, alias=alias, page_size=1000, page_token=token)),
            lambda page: page.moves,
        )

    async def delete_alias(self, model: str, alias: str, reason: str = "") -> None:
        await answer(self._stub.DeleteAlias(pb.DeleteAliasRequest(model=model, alias=alias, reason=reason)))
