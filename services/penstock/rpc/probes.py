"""What every server answers beside its own services: health and reflection."""

from collections.abc import Sequence

from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2, reflection_pb2_grpc

from penstock.rpc.application import Service
from penstock.rpc.config import ServerSettings
from penstock.rpc.health import HealthServicer


def with_probes(settings: ServerSettings, services: Sequence[Service]) -> tuple[HealthServicer, list[Service]]:
    """The services with health and, where the settings want it, reflection; and the health that can be drained."""
    health = HealthServicer(name for service in services for name in service.names)
    probed = [
        *services,
        Service(health_pb2.DESCRIPTOR, lambda server: health_pb2_grpc.add_HealthServicer_to_server(health, server)),
    ]
    if settings.reflection:
        probed.append(_reflection(probed))
    return health, probed


def _reflection(services: Sequence[Service]) -> Service:
    """Reflection over one pool of all files: the protocol of inference lives in a pool of its own."""
    pool = descriptor_pool.DescriptorPool()
    seen: set[str] = set()
    for file in (*(service.file for service in services), reflection_pb2.DESCRIPTOR):
        _copy_file(file, pool, seen)
    names = (*(name for service in services for name in service.names), reflection.SERVICE_NAME)
    servicer = reflection.aio.ReflectionServicer(names, pool=pool)
    return Service(
        reflection_pb2.DESCRIPTOR,
        lambda server: reflection_pb2_grpc.add_ServerReflectionServicer_to_server(servicer, server),
    )


def _copy_file(file: FileDescriptor, pool: descriptor_pool.DescriptorPool, seen: set[str]) -> None:
    if file.name in seen:
        return
    seen.add(file.name)
    for dependency in file.dependencies:
        _copy_file(dependency, pool, seen)
    pool.AddSerializedFile(file.serialized_pb)
