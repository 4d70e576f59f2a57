"""The DeploymentService: translates between the wire and the deployments."""

from collections.abc import AsyncIterator

from penstock.api.registry.v1 import deployment_service_pb2 as pb
from penstock.api.registry.v1 import deployment_service_pb2_grpc as rpc
from penstock.registry import checks, deployments, tables
from penstock.registry.desired import DesiredState
from penstock.registry.lookups import find_deployment
from penstock.registry.store import Store
from penstock.rpc.server import Service
from penstock.rpc.validation import page_size, validating
from penstock.storage.paging import name_token, read_page


class DeploymentServicer(rpc.DeploymentServiceServicer):
    """Serves the deployments of a store."""

    def __init__(self, store: Store, desired: DesiredState) -> None:
        self._store = store
        self._desired = desired

    def service(self) -> Service:
        return Service(pb.DESCRIPTOR, lambda server: rpc.add_DeploymentServiceServicer_to_server(self, server))

    async def SetDeployment(self, request: pb.SetDeploymentRequest, context: object) -> pb.SetDeploymentResponse:
        with validating() as violations:
            checks.check_deployment(violations, "deployment", request.deployment)
        async with self._store.change() as change:
            deployment = await deployments.put(change, request.deployment)
        return pb.SetDeploymentResponse(deployment=deployment)

    async def GetDeployment(self, request: pb.GetDeploymentRequest, context: object) -> pb.GetDeploymentResponse:
        with validating() as violations:
            violations.name("model", request.model)
        async with self._store.snapshot() as session:
            row = await find_deployment(session, request.model)
        return pb.GetDeploymentResponse(deployment=row.message())

    async def ListDeployments(self, request: pb.ListDeploymentsRequest, context: object) -> pb.ListDeploymentsResponse:
        with validating() as violations:
            size = page_size(violations, request.page_size)
            model = name_token(violations, request.page_token)
        async with self._store.snapshot() as session:
            page, token = await read_page(
                session, deployments.after(model), size, tables.Deployment.message, lambda row: row.model
            )
        return pb.ListDeploymentsResponse(deployments=page, next_page_token=token)

    async def DeleteDeployment(
        self, request: pb.DeleteDeploymentRequest, context: object
    ) -> pb.DeleteDeploymentResponse:
        with validating() as violations:
            violations.name("model", request.model)
        async with self._store.change() as change:
            await deployments.remove(change, request.model)
        return pb.DeleteDeploymentResponse()

    async def Watch(self, request: pb.WatchRequest, context: object) -> AsyncIterator[pb.WatchResponse]:
        async for state in self._desired.watch():
            yield state
