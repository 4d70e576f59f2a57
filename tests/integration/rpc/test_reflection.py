"""Reflection tells tools like grpcurl every service, from our descriptor pool and from the protocol's private one."""

from collections.abc import AsyncIterator

import grpc
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool
from grpc_reflection.v1alpha import reflection_pb2 as pb
from grpc_reflection.v1alpha import reflection_pb2_grpc as rpc
from tests.integration.rpc.probe import Probe, served

from penstock.oip import inference_pb2, inference_pb2_grpc
from penstock.rpc.server import Service

OIP = Service(
    inference_pb2.DESCRIPTOR,
    lambda server: inference_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(
        inference_pb2_grpc.GRPCInferenceServiceServicer(), server
    ),
)


async def asked(channel: grpc.aio.Channel, *requests: pb.ServerReflectionRequest) -> list[pb.ServerReflectionResponse]:
    async def stream() -> AsyncIterator[pb.ServerReflectionRequest]:
        for request in requests:
            yield request

    return [response async for response in rpc.ServerReflectionStub(channel).ServerReflectionInfo(stream())]


async def test_every_service_is_listed() -> None:
    async with served(Probe().service(), OIP) as channel:
        (answer,) = await asked(channel, pb.ServerReflectionRequest(list_services=""))
    assert {service.name for service in answer.list_services_response.service} == {
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
        "penstock.api.registry.v1.ArtifactService",
    }


@pytest.mark.parametrize(
    "symbol",
    [
        "grpc.health.v1.Health",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
        "inference.ModelInferRequest",
        "penstock.api.registry.v1.ArtifactService",
        "penstock.api.types.v1.Blob",
    ],
)
async def test_the_files_of_a_symbol_stand_on_their_own(symbol: str) -> None:
    async with served(Probe().service(), OIP) as channel:
        (answer,) = await asked(channel, pb.ServerReflectionRequest(file_containing_symbol=symbol))
        pool = descriptor_pool.DescriptorPool()
        for data in reversed(answer.file_descriptor_response.file_descriptor_proto):
            pool.AddSerializedFile(data)
    assert symbol in {
        *(name for file in files(answer) for name in names(file)),
    }


def files(answer: pb.ServerReflectionResponse) -> list[descriptor_pb2.FileDescriptorProto]:
    return [
        descriptor_pb2.FileDescriptorProto.FromString(data)
        for data in answer.file_descriptor_response.file_descriptor_proto
    ]


def names(file: descriptor_pb2.FileDescriptorProto) -> list[str]:
    return [f"{file.package}.{item.name}" for item in (*file.service, *file.message_type)]


async def test_an_unknown_symbol_is_answered_and_the_stream_goes_on() -> None:
    async with served(Probe().service()) as channel:
        unknown, listed = await asked(
            channel,
            pb.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService"),
            pb.ServerReflectionRequest(list_services=""),
        )
    assert unknown.error_response.error_code == grpc.StatusCode.NOT_FOUND.value[0]
    assert listed.list_services_response.service


async def test_reflection_can_be_switched_off() -> None:
    async with served(Probe().service(), reflection=False) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await asked(channel, pb.ServerReflectionRequest(list_services=""))
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
