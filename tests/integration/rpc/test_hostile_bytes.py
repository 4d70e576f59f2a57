"""Any bytes to any method of any service: a status of the caller's, no fault of the server's, and it lives on."""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2
from structlog.testing import capture_logs
from tests.integration.rpc.hostile import Hostile

from penstock.api.dataset.v1 import dataset_service_pb2
from penstock.api.inference.v1 import serving_service_pb2
from penstock.api.registry.v1 import artifact_service_pb2, deployment_service_pb2, registry_service_pb2
from penstock.api.training.v1 import training_service_pb2, worker_service_pb2
from penstock.inference.app import application as inference
from penstock.inference.settings import InferenceSettings
from penstock.oip import inference_pb2
from penstock.registry.app import application as registry
from penstock.registry.settings import RegistrySettings
from penstock.rpc.config import ServerSettings
from penstock.rpc.server import Application, listening
from penstock.training.app import application as training
from penstock.training.settings import TrainingSettings

CALLS_A_METHOD = 25
CALLS_AT_ONCE = 40
# No call of these takes longer, except a watch that has nothing to tell.
LIMIT_S = 20.0

COMMON = (health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR)
REGISTRY = (registry_service_pb2.DESCRIPTOR, deployment_service_pb2.DESCRIPTOR, artifact_service_pb2.DESCRIPTOR)
TRAINING = (
    dataset_service_pb2.DESCRIPTOR,
    training_service_pb2.DESCRIPTOR,
    worker_service_pb2.DESCRIPTOR,
    artifact_service_pb2.DESCRIPTOR,
)
INFERENCE = (inference_pb2.DESCRIPTOR, serving_service_pb2.DESCRIPTOR)

FAULTS = {grpc.StatusCode.UNKNOWN, grpc.StatusCode.INTERNAL, grpc.StatusCode.DEADLINE_EXCEEDED}
# What grpc.aio's own client makes of an answer that overtakes what it still sends; no server said so.
OVERTAKEN = "Internal error from Core"

Make = Callable[[Any], AbstractAsyncContextManager[Application]]


def methods(files: Iterable[FileDescriptor]) -> Iterator[MethodDescriptor]:
    for file in files:
        for service in file.services_by_name.values():
            yield from service.methods


async def fault(channel: grpc.aio.Channel, method: MethodDescriptor, hostile: Hostile) -> str:
    """Calls a method once; reads one message of a stream that answers. Returns what the server did wrong, if it did."""
    shape = (
        ("stream" if method.client_streaming else "unary") + "_" + ("stream" if method.server_streaming else "unary")
    )
    call_method = getattr(channel, shape)(f"/{method.containing_service.full_name}/{method.name}")
    make = hostile.stream if method.client_streaming else hostile.message
    call = call_method(make(method.input_type), timeout=LIMIT_S)
    try:
        if method.server_streaming:
            await call.read() if method.client_streaming else await anext(aiter(call), None)
            call.cancel()
        else:
            await call
    except grpc.aio.AioRpcError as error:
        if error.code() in FAULTS and error.details() != OVERTAKEN:
            return f"{method.full_name}: {error.code().name}: {error.details()}"
    except asyncio.CancelledError:
        # From the same race; nobody else cancels here.
        if not method.client_streaming:
            raise
    return ""


@pytest.mark.parametrize(
    ("settings", "make", "files"),
    [
        (RegistrySettings, registry, REGISTRY),
        (TrainingSettings, training, TRAINING),
        (InferenceSettings, inference, INFERENCE),
    ],
    ids=["registry", "training", "inference"],
)
async def test_any_bytes_to_any_method(
    settings: type[ServerSettings], make: Make, files: tuple[FileDescriptor, ...], tmp_path: Path
):
    hostile = Hostile(settings.section)
    loop_errors: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: loop_errors.append(context))
    values = {"home": tmp_path, "port": 0, "drain_s": 1.0}
    if settings is not RegistrySettings:
        # Nobody is there, and nothing here needs anybody.
        values["registry"] = "127.0.0.1:1"
    loaded = settings.load(values)
    at_once = asyncio.Semaphore(CALLS_AT_ONCE)

    async def bounded(call: Awaitable[str]) -> str:
        async with at_once:
            return await call

    with capture_logs() as logs:
        async with (
            make(loaded) as app,
            listening(loaded, app) as address,
            grpc.aio.insecure_channel(address) as channel,
        ):
            calls = [
                fault(channel, method, hostile) for method in methods((*files, *COMMON)) for _ in range(CALLS_A_METHOD)
            ]
            faults = await asyncio.gather(*map(bounded, calls))
            health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=LIMIT_S)
            assert health.status == health_pb2.HealthCheckResponse.SERVING
    assert [found for found in faults if found] == []
    assert [entry for entry in logs if entry["event"] == "unexpected error"] == []
    assert loop_errors == []
