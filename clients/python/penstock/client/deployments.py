"""Deployments: what is to be served, and what a server has made of it."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import grpc

from penstock.api.inference.v1 import serving_service_pb2, serving_service_pb2_grpc
from penstock.api.registry.v1 import deployment_service_pb2 as pb
from penstock.api.registry.v1 import deployment_service_pb2_grpc
from penstock.client.errors import answer
from penstock.client.pages import all_pages

if TYPE_CHECKING:
    from penstock.api.inference.v1.serving_service_pb2_grpc import ServingServiceAsyncStub
    from penstock.api.registry.v1.deployment_service_pb2_grpc import DeploymentServiceAsyncStub


class AsyncDeployments:
    """The registry's DeploymentService and a server's ServingService. Every method raises `PenstockError`."""

    def __init__(self, registry: grpc.aio.Channel, inference: grpc.aio.Channel) -> None:
        self._stub: DeploymentServiceAsyncStub = deployment_service_pb2_grpc.DeploymentServiceStub(registry)
        self._serving: ServingServiceAsyncStub = serving_service_pb2_grpc.ServingServiceStub(inference)

    async def set(self, deployment: pb.Deployment) -> pb.Deployment:
        """Records what is to be served; inference servers follow in their own time (see `serving`)."""
        return (await answer(self._stub.SetDeployment(pb.SetDeploymentRequest(deployment=deployment)))).deployment

    async def get(self, model: str) -> pb.Deployment:
        return (await answer(self._stub.GetDeployment(pb.GetDeploymentRequest(model=model)))).deployment

    async def list(self) -> Sequence[pb.Deployment]:
        """All deployments, by model."""
        call = self._stub.ListDeployments
        return await all_pages(
            lambda token: call(pb.ListDeploymentsRequest(page_size=1000, page_token=token)),
            lambda page: page.deployments,
        )

    async def delete(self, model: str) -> None:
        """Stops the serving of a model."""
        await answer(self._stub.DeleteDeployment(pb.DeleteDeploymentRequest(model=model)))

    async def serving(self, model: str = "") -> Sequence[serving_service_pb2.ServedVersion]:
        """What the inference server serves or is about to, of one model or of all."""
        request = serving_service_pb2.ListServedVersionsRequest(model=model)
        return list((await answer(self._serving.ListServedVersions(request))).versions)
