"""What this server has made of its deployments, for operators and the command line."""

from google.protobuf.timestamp_pb2 import Timestamp

from penstock.api.inference.v1 import serving_service_pb2 as pb
from penstock.api.inference.v1 import serving_service_pb2_grpc as rpc
from penstock.inference.repository import Repository
from penstock.inference.served_version import ServedVersion, State
from penstock.rpc.server import Service

_STATES = {
    State.LOADING: pb.SERVING_STATE_LOADING,
    State.READY: pb.SERVING_STATE_READY,
    State.DRAINING: pb.SERVING_STATE_DRAINING,
    State.FAILED: pb.SERVING_STATE_FAILED,
}


class ServingServicer(rpc.ServingServiceServicer):
    """Translates between the wire and the repository."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    def service(self) -> Service:
        return Service(pb.DESCRIPTOR, lambda server: rpc.add_ServingServiceServicer_to_server(self, server))

    async def ListServedVersions(
        self, request: pb.ListServedVersionsRequest, context: object
    ) -> pb.ListServedVersionsResponse:
        versions = [self._served(version) for version in self._repository.versions(request.model)]
        return pb.ListServedVersionsResponse(versions=versions, revision=self._repository.revision)

    def _served(self, served: ServedVersion) -> pb.ServedVersion:
        update_time = Timestamp()
        update_time.FromNanoseconds(int(served.update_time_s * 1e9))
        return pb.ServedVersion(
            model=served.model,
            version=served.number,
            state=_STATES[served.state],
            message=served.message,
            weight=self._repository.weight(served),
            update_time=update_time,
            bundle_digest=served.wanted.digest,
        )
