"""The Open Inference Protocol over the repository."""

import asyncio
import importlib.metadata

from penstock.inference.repository import Repository, UnknownModelError
from penstock.inference.request import RequestReader, timeout_s
from penstock.inference.served_version import ServedVersion, State
from penstock.inference.signature import Tensor
from penstock.inference.tensors import encode_raw
from penstock.oip import inference_pb2 as pb
from penstock.oip import inference_pb2_grpc as rpc
from penstock.rpc.errors import DeadlineError, InvalidFieldError, NotReadyError, UnimplementedError
from penstock.rpc.server import Service

PLATFORM = "onnxruntime_onnx"
EXTENSIONS = ("binary_tensor_data",)

_INDEX_STATES = {
    State.LOADING: "LOADING",
    State.READY: "READY",
    State.DRAINING: "UNLOADING",
    State.FAILED: "UNAVAILABLE",
}


class InferenceServicer(rpc.GRPCInferenceServiceServicer):
    """Translates between the protocol and the repository."""

    def __init__(self, repository: Repository, server_name: str) -> None:
        self._repository = repository
        self._server_name = server_name

    def service(self) -> Service:
        return Service(pb.DESCRIPTOR, lambda server: rpc.add_GRPCInferenceServiceServicer_to_server(self, server))

    async def ServerLive(self, request: pb.ServerLiveRequest, context: object) -> pb.ServerLiveResponse:
        return pb.ServerLiveResponse(live=True)

    async def ServerReady(self, request: pb.ServerReadyRequest, context: object) -> pb.ServerReadyResponse:
        return pb.ServerReadyResponse(ready=self._repository.settled)

    async def ModelReady(self, request: pb.ModelReadyRequest, context: object) -> pb.ModelReadyResponse:
        try:
            version = self._repository.describe(request.name, request.version)
        except (UnknownModelError, NotReadyError, UnimplementedError):
            return pb.ModelReadyResponse(ready=False)
        return pb.ModelReadyResponse(ready=version.state is State.READY)

    async def ServerMetadata(self, request: pb.ServerMetadataRequest, context: object) -> pb.ServerMetadataResponse:
        version = importlib.metadata.version("penstock")
        return pb.ServerMetadataResponse(name=self._server_name, version=version, extensions=EXTENSIONS)

    async def ModelMetadata(self, request: pb.ModelMetadataRequest, context: object) -> pb.ModelMetadataResponse:
        signature = self._repository.describe(request.name, request.version).signature
        ready = [held for held in self._repository.versions(request.name) if held.state is State.READY]
        return pb.ModelMetadataResponse(
            name=request.name,
            versions=[str(held.version.number) for held in ready],
            platform=PLATFORM,
            inputs=map(_metadata, signature.inputs.values()),
            outputs=map(_metadata, signature.outputs.values()),
        )

    async def ModelInfer(self, request: pb.ModelInferRequest, context: object) -> pb.ModelInferResponse:
        served = self._repository.route(request.model_name, request.model_version)
        signature = served.signature
        inference = RequestReader(served.title, signature, served.max_batch_size).read(request)
        limit_s = timeout_s(request)
        try:
            async with asyncio.timeout(limit_s):
                arrays = await served.infer(inference)
        except TimeoutError:
            raise DeadlineError(f"The request's timeout of {limit_s:g} s passed before its answer was there.") from None
        response = pb.ModelInferResponse(
            model_name=request.model_name, model_version=str(served.version.number), id=request.id
        )
        for name, array in zip(inference.outputs, arrays, strict=True):
            datatype = signature.outputs[name].datatype
            response.outputs.add(name=name, datatype=datatype.name, shape=array.shape)
            response.raw_output_contents.append(encode_raw(datatype, array))
        return response

    async def RepositoryIndex(self, request: pb.RepositoryIndexRequest, context: object) -> pb.RepositoryIndexResponse:
        if request.repository_name:
            raise InvalidFieldError.of(
                "repository_name", f"expected none, there is one repository; got {request.repository_name[:80]!r}"
            )
        held = self._repository.versions()
        return pb.RepositoryIndexResponse(
            models=[_index(version) for version in held if version.state is State.READY or not request.ready]
        )


def _metadata(tensor: Tensor) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(
        name=tensor.name, datatype=tensor.datatype.name, shape=tensor.wire_shape
    )


def _index(version: ServedVersion) -> pb.RepositoryIndexResponse.ModelIndex:
    return pb.RepositoryIndexResponse.ModelIndex(
        name=version.version.model,
        version=str(version.version.number),
        state=_INDEX_STATES[version.state],
        reason=version.message,
    )
