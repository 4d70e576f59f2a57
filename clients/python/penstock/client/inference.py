"""Answers from deployed models, by the Open Inference Protocol."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import grpc

from penstock.client.errors import answer
from penstock.client.tensors import Array, decode_tensor, encode_tensor
from penstock.oip import inference_pb2 as pb
from penstock.oip import inference_pb2_grpc

if TYPE_CHECKING:
    from penstock.oip.inference_pb2_grpc import GRPCInferenceServiceAsyncStub


@dataclass(frozen=True)
class InferResult:
    """A model's answer: its outputs by name, in the order of the answer, and the version that gave them."""

    outputs: Mapping[str, Array]
    model: str
    version: str


class AsyncInference:
    """The GRPCInferenceService. Every method raises `PenstockError`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: GRPCInferenceServiceAsyncStub = inference_pb2_grpc.GRPCInferenceServiceStub(channel)

    async def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        version: str = "",
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> InferResult:
        """Runs a model once.

        Args:
            model: its name.
            inputs: an array for every input of its signature, batch first.
            version: a version's number; empty for the deployed one.
            outputs: the outputs that are wanted; none for all.
            timeout_s: how long the answer may take. A request still waiting then is never run.
        """
        request = pb.ModelInferRequest(model_name=model, model_version=version)
        for name, array in inputs.items():
            description, raw = encode_tensor(name, array)
            request.inputs.append(description)
            request.raw_input_contents.append(raw)
        request.outputs.extend(pb.ModelInferRequest.InferRequestedOutputTensor(name=name) for name in outputs)
        response = await answer(self._stub.ModelInfer(request, timeout=timeout_s))
        arrays = {
            output.name: decode_tensor(output, raw)
            for output, raw in zip(response.outputs, response.raw_output_contents, strict=True)
        }
        return InferResult(arrays, response.model_name, response.model_version)

    async def is_server_live(self) -> bool:
        return (await answer(self._stub.ServerLive(pb.ServerLiveRequest()))).live

    async def is_server_ready(self) -> bool:
        return (await answer(self._stub.ServerReady(pb.ServerReadyRequest()))).ready

    async def is_model_ready(self, model: str, version: str = "") -> bool:
        """Whether the model answers requests; False for one that the server does not know."""
        return (await answer(self._stub.ModelReady(pb.ModelReadyRequest(name=model, version=version)))).ready

    async def server_metadata(self) -> pb.ServerMetadataResponse:
        return await answer(self._stub.ServerMetadata(pb.ServerMetadataRequest()))

    async def model_metadata(self, model: str, version: str = "") -> pb.ModelMetadataResponse:
        """The inputs and outputs of a model, −1 for a dynamic axis."""
        return await answer(self._stub.ModelMetadata(pb.ModelMetadataRequest(name=model, version=version)))

    async def repository_index(self, ready: bool = False) -> Sequence[pb.RepositoryIndexResponse.ModelIndex]:
        """The versions that the server knows, or only those that are ready."""
        return list((await answer(self._stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=ready)))).models)
