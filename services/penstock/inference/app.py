"""The inference service, put together."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import grpc

from penstock.api.registry.v1.artifact_service_pb2_grpc import ArtifactServiceStub
from penstock.api.registry.v1.deployment_service_pb2_grpc import DeploymentServiceStub
from penstock.inference.batcher import BatchLimits
from penstock.inference.bundle_cache import BundleCache
from penstock.inference.follower import Follower
from penstock.inference.loader import OnnxLoader
from penstock.inference.oip_servicer import InferenceServicer
from penstock.inference.repository import Repository
from penstock.inference.serving_servicer import ServingServicer
from penstock.inference.settings import InferenceSettings
from penstock.rpc.server import Application
from penstock.storage.home import locked_home


@asynccontextmanager
async def application(settings: InferenceSettings) -> AsyncIterator[Application]:
    """The running service. Raises `StartupError` if its home cannot be had; a registry that is down is no error."""
    with locked_home(settings.service_home) as home:
        async with _channel(settings) as channel:
            cache = BundleCache(home / "cache", ArtifactServiceStub(channel))
            loader = OnnxLoader(cache, home / "workspace", settings.threads_per_run, settings.warm_up)
            repository = Repository(loader, BatchLimits(settings.max_batch_size, settings.max_queue_size))
            follower = Follower(DeploymentServiceStub(channel), repository, home / "desired.binpb")
            follower.restore()
            following = asyncio.create_task(follower.run())

            async def drain() -> None:
                repository.drain()

            try:
                services = [
                    InferenceServicer(repository, settings.server_name).service(),
                    ServingServicer(repository).service(),
                ]
                yield Application(services, drain)
            finally:
                following.cancel()
                with suppress(asyncio.CancelledError):
                    await following
                await repository.close()


def _channel(settings: InferenceSettings) -> grpc.aio.Channel:
    return grpc.aio.insecure_channel(
        settings.registry,
        options=[
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.initial_reconnect_backoff_ms", 200),
            ("grpc.max_reconnect_backoff_ms", 5_000),
            # A registry that vanishes without a word is noticed; servers refuse pings that come more often than this.
            ("grpc.keepalive_time_ms", 310_000),
            ("grpc.keepalive_timeout_ms", 20_000),
        ],
    )
