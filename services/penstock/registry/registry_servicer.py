"""The RegistryService: translates between the wire and models, versions and aliases."""

from penstock.api.registry.v1 import registry_service_pb2 as pb
from penstock.api.registry.v1 import registry_service_pb2_grpc as rpc
from penstock.registry import aliases, checks, models, tables, versions
from penstock.registry.lookups import find_alias, find_model, find_version
from penstock.registry.store import Store
from penstock.rpc.server import Service
from penstock.rpc.validation import page_size, validating
from penstock.storage.blobs import BlobStore
from penstock.storage.paging import name_token, number_token, read_page


class RegistryServicer(rpc.RegistryServiceServicer):
    """Serves the models of a store."""

    def __init__(self, store: Store, blobs: BlobStore) -> None:
        self._store = store
        self._blobs = blobs

    def service(self) -> Service:
        return Service(pb.DESCRIPTOR, lambda server: rpc.add_RegistryServiceServicer_to_server(self, server))

    async def CreateModel(self, request: pb.CreateModelRequest, context: object) -> pb.CreateModelResponse:
        with validating() as violations:
            violations.name("model.name", request.model.name)
            violations.text("model.description", request.model.description)
        async with self._store.change() as change:
            model = await models.create(change, request.model.name, request.model.description)
        return pb.CreateModelResponse(model=model)

    async def GetModel(self, request: pb.GetModelRequest, context: object) -> pb.GetModelResponse:
        with validating() as violations:
            violations.name("name", request.name)
        async with self._store.snapshot() as session:
            row = await find_model(session, request.name)
        return pb.GetModelResponse(model=row.message())

    async def ListModels(self, request: pb.ListModelsRequest, context: object) -> pb.ListModelsResponse:
        with validating() as violations:
            size = page_size(violations, request.page_size)
            name = name_token(violations, request.page_token)
        async with self._store.snapshot() as session:
            page, token = await read_page(session, models.after(name), size, tables.Model.message, lambda row: row.name)
        return pb.ListModelsResponse(models=page, next_page_token=token)

    async def DeleteModel(self, request: pb.DeleteModelRequest, context: object) -> pb.DeleteModelResponse:
        with validating() as violations:
            violations.name("name", request.name)
        async with self._store.change() as change:
            digests = await models.remove(change, request.name)
        await versions.discard_unused(self._store, self._blobs, digests)
        return pb.DeleteModelResponse()

    async def CreateVersion(self, request: pb.CreateVersionRequest, context: object) -> pb.CreateVersionResponse:
        with validating() as violations:
            checks.check_version(violations, "version", request.version)
            violations.request_id("request_id", request.request_id)
        async with self._store.change() as change:
            version = await versions.create(change, self._blobs, request.version, request.request_id)
        return pb.CreateVersionResponse(version=version)

    async def GetVersion(self, request: pb.GetVersionRequest, context: object) -> pb.GetVersionResponse:
        selector = request.WhichOneof("selector")
        with validating() as violations:
            violations.name("model", request.model)
            if selector == "number":
                checks.check_number(violations, "number", request.number)
            elif selector == "alias":
                checks.check_alias(violations, "alias", request.alias)
        async with self._store.snapshot() as session:
            if selector is None:
                row = await versions.newest(session, request.model)
            elif selector == "number":
                row = await find_version(session, request.model, request.number)
            else:
                alias = await find_alias(session, request.model, request.alias)
                row = await find_version(session, request.model, alias.version)
        return pb.GetVersionResponse(version=row.message())

    async def ListVersions(self, request: pb.ListVersionsRequest, context: object) -> pb.ListVersionsResponse:
        with validating() as violations:
            violations.name("model", request.model)
            size = page_size(violations, request.page_size)
            number = number_token(violations, request.page_token)
        async with self._store.snapshot() as session:
            await find_model(session, request.model)
            page, token = await read_page(
                session, versions.below(request.model, number), size, tables.Version.message, lambda row: row.number
            )
        return pb.ListVersionsResponse(versions=page, next_page_token=token)

    async def DeleteVersion(self, request: pb.DeleteVersionRequest, context: object) -> pb.DeleteVersionResponse:
        with validating() as violations:
            violations.name("model", request.model)
            checks.check_number(violations, "number", request.number)
        async with self._store.change() as change:
            digests = await versions.remove(change, request.model, request.number)
        await versions.discard_unused(self._store, self._blobs, digests)
        return pb.DeleteVersionResponse()

    async def SetAlias(self, request: pb.SetAliasRequest, context: object) -> pb.SetAliasResponse:
        expected = request.expected_version if request.HasField("expected_version") else None
        with validating() as violations:
            violations.name("model", request.model)
            checks.check_alias(violations, "alias", request.alias)
            checks.check_number(violations, "version", request.version)
            violations.require(
                expected is None or expected >= 0, "expected_version", f"expected 0 or more; got {expected}"
            )
            violations.text("reason", request.reason)
        async with self._store.change() as change:
            alias = await aliases.move(
                change, request.model, request.alias, request.version, expected=expected, reason=request.reason
            )
        return pb.SetAliasResponse(alias=alias)

    async def ListAliases(self, request: pb.ListAliasesRequest, context: object) -> pb.ListAliasesResponse:
        with validating() as violations:
            violations.name("model", request.model)
        async with self._store.snapshot() as session:
            rows = await aliases.of_model(session, request.model)
        return pb.ListAliasesResponse(aliases=[row.message() for row in rows])

    async def ListAliasMoves(self, request: pb.ListAliasMovesRequest, context: object) -> pb.ListAliasMovesResponse:
        with validating() as violations:
            violations.name("model", request.model)
            checks.check_alias(violations, "alias", request.alias)
            size = page_size(violations, request.page_size)
            before = number_token(violations, request.page_token)
        async with self._store.snapshot() as session:
            query = await aliases.moves(session, request.model, request.alias, before)
            page, token = await read_page(session, query, size, tables.AliasMove.message, lambda row: row.id)
        return pb.ListAliasMovesResponse(moves=page, next_page_token=token)

    async def DeleteAlias(self, request: pb.DeleteAliasRequest, context: object) -> pb.DeleteAliasResponse:
        with validating() as violations:
            violations.name("model", request.model)
            checks.check_alias(violations, "alias", request.alias)
            violations.text("reason", request.reason)
        async with self._store.change() as change:
            await aliases.remove(change, request.model, request.alias, request.reason)
        return pb.DeleteAliasResponse()
