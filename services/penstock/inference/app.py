"""The inference service, put together."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import grpc
from prometheus_client import PROCESS_COLLECTOR

from penstock.api.registry.v1.artifact_service_pb2_grpc import ArtifactServiceStub
from penstock.api.registry.v1.deployment_service_pb2_grpc import DeploymentServiceStub
from penstock.inference.bundle_cache import BundleCache
from penstock.inference.control import ModelControl
from penstock.inference.cuda_memory import CudaMemory
from penstock.inference.folder_models import FolderModels
from penstock.inference.follower import Follower
from penstock.inference.index import RegistryControl
from penstock.inference.loader import RegistryLoader
from penstock.inference.log_settings import LogSettings
from penstock.inference.metrics import (
    Collector,
    LoadMetrics,
    MetricsCollector,
    VersionMetrics,
    on_loop,
    serve_metrics,
)
from penstock.inference.oip_servicer import InferenceServicer, Memory
from penstock.inference.onnx_model import OnnxOptions
from penstock.inference.opener import ModelOpener
from penstock.inference.repository import Repository
from penstock.inference.response_cache import ResponseCache
from penstock.inference.served_version import ServedVersion, State
from penstock.inference.serving_servicer import ServingServicer
from penstock.inference.settings import InferenceSettings
from penstock.inference.shared_memory import SharedMemory
from penstock.inference.trace_settings import TraceConfig, TraceSettings
from penstock.inference.tracing import Tracer
from penstock.inference.uploads import Uploads
from penstock.inference.workers import joined
from penstock.rpc.application import Application, Service
from penstock.storage.home import locked_home

# Trace files together; clients switch tracing on, the disk is the operator's.
_MAX_TRACE_BYTES = 1024**3


@asynccontextmanager
async def application(settings: InferenceSettings) -> AsyncIterator[Application]:
    """The running service. Raises `StartupError` if its home cannot be had; a registry that is down is no error."""
    async with AsyncExitStack() as stack:
        home = stack.enter_context(locked_home(settings.service_home))
        loads = LoadMetrics()
        repository, control = await _models(settings, home, loads, stack)
        memory = Memory(SharedMemory(settings.allow_client_shm), CudaMemory(settings.allow_client_shm))
        stack.callback(memory.close)
        tracer = _tracer(settings, repository)
        stack.push_async_callback(asyncio.to_thread, tracer.close)

        async def drain() -> None:
            repository.drain()

        servicer = InferenceServicer(
            repository,
            control,
            memory,
            LogSettings(),
            tracer,
            settings.server_name,
            settings.max_message_bytes,
            refuses_with_exhausted=settings.queue_full == "resource_exhausted",
        )
        collector = MetricsCollector(on_loop(asyncio.get_running_loop(), lambda: _snapshot(repository)), loads)
        service = await _with_metrics(settings, servicer, collector, stack)
        yield Application([service, ServingServicer(repository).service()], drain)


async def _with_metrics(
    settings: InferenceSettings, servicer: InferenceServicer, collector: Collector, stack: AsyncExitStack
) -> Service:
    """What answers clients, alone or as one of several workers, with the server's metrics beside it."""
    service, collectors = servicer.service(), [collector, PROCESS_COLLECTOR]
    if settings.worker is not None:
        service, together = await stack.enter_async_context(joined(settings, settings.worker, servicer, collector))
        collectors = [together]
    if settings.metrics_port >= 0 and not settings.worker:
        metrics = serve_metrics(settings.host, settings.metrics_port, *collectors)
        stack.push_async_callback(asyncio.to_thread, metrics.close)
    return service


async def _models(
    settings: InferenceSettings, home: Path, loads: LoadMetrics, stack: AsyncExitStack
) -> tuple[Repository, ModelControl]:
    """The repository, kept in step with its source for as long as the stack is open."""
    options = OnnxOptions(
        max_batch_size=settings.max_batch_size,
        intra_op_threads=settings.intra_op_threads,
        warm_up=settings.warm_up,
        inline_threshold_us=settings.inline_threshold_us,
        execution_providers=tuple(name.strip() for name in settings.execution_providers.split(",")),
    )
    cache = ResponseCache(settings.cache_bytes) if settings.cache_bytes else None

    def lookup(name: str, number: str) -> ServedVersion:
        return repository.describe(name, number)

    opener = ModelOpener(options, settings.max_queue_size, cache, lookup)
    if settings.repository is not None:
        repository = Repository(lambda _: None, loads, retries=False)
        uploads = Uploads(home / "uploads")
        stack.push_async_callback(asyncio.to_thread, uploads.close)
        # Before the uploads go, what is served from them is closed.
        stack.push_async_callback(repository.close)
        models = FolderModels(settings.repository, repository, opener, uploads, explicit=settings.mode == "explicit")
        await models.start([name for name in settings.load_model.split(",") if name])
        if settings.mode == "poll":
            _in_background(models.poll(settings.poll_interval_s), stack)
        return repository, models
    repository = await _following(settings, home, loads, opener, stack)
    return repository, RegistryControl(repository)


async def _following(
    settings: InferenceSettings, home: Path, loads: LoadMetrics, opener: ModelOpener, stack: AsyncExitStack
) -> Repository:
    """A repository that follows the registry's deployments."""
    channel = await stack.enter_async_context(_channel(settings))
    loader = RegistryLoader(BundleCache(home / "cache", ArtifactServiceStub(channel)), home / "workspace", opener)
    repository = Repository(loader.prune, loads, retries=True)
    stack.push_async_callback(repository.close)
    follower = Follower(DeploymentServiceStub(channel), repository, loader, home / "desired.binpb")
    follower.restore()
    _in_background(follower.run(), stack)
    return repository


def _in_background(work: Coroutine[object, object, None], stack: AsyncExitStack) -> None:
    """Runs until the stack is closed."""
    task = asyncio.create_task(work)

    async def end() -> None:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    stack.push_async_callback(end)


def _tracer(settings: InferenceSettings, repository: Repository) -> Tracer:
    traces = TraceSettings(
        TraceConfig(), settings.trace_file, settings.otlp_endpoint, lambda model: repository.describe(model, "")
    )
    # Two processes would write over each other's traces.
    suffix = "" if settings.worker is None else f".worker-{settings.worker}"
    return Tracer(traces, _MAX_TRACE_BYTES // settings.workers, file_suffix=suffix)


def _snapshot(repository: Repository) -> list[VersionMetrics]:
    return [
        VersionMetrics(held.model, str(held.number), held.statistics, held.pending)
        for held in repository.versions()
        if held.state is State.READY
    ]


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
