"""Requests that wait, through the wire: deadlines, callers that leave, a full queue, a server that stops.

On grpcio alone: the tests hold the engine in their hands, so it runs in their process.
"""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.integration.inference.fleet import infer_request
from tests.unit.inference.gated import GatedEngine, GatedLoader

from penstock.inference.cuda_memory import CudaMemory
from penstock.inference.index import RegistryControl
from penstock.inference.log_settings import LogSettings
from penstock.inference.metrics import LoadMetrics
from penstock.inference.oip_servicer import InferenceServicer, Memory
from penstock.inference.repository import Repository
from penstock.inference.serving_servicer import ServingServicer
from penstock.inference.settings import InferenceSettings
from penstock.inference.shared_memory import SharedMemory
from penstock.inference.trace_settings import TraceConfig, TraceSettings
from penstock.inference.tracing import Tracer
from penstock.oip import inference_pb2 as pb
from penstock.oip.inference_pb2_grpc import GRPCInferenceServiceStub
from penstock.rpc.server import Application, listening

QUEUE = 3


class Gated:
    """A server with one READY model whose runs wait for the test."""

    oip: GRPCInferenceServiceStub

    def __init__(self, repository: Repository, engine: GatedEngine) -> None:
        self.engine = engine
        self.stop = asyncio.Event()
        self.draining = asyncio.Event()
        self._repository = repository

    async def drain(self) -> None:
        self._repository.drain()
        self.draining.set()

    def ask(self, value: float = 1, timeout_s: float = 20) -> "grpc.aio.UnaryUnaryCall[object, object]":
        return self.oip.ModelInfer(self.request(value), timeout=timeout_s)

    def request(self, value: float = 1) -> pb.ModelInferRequest:
        return infer_request("gated", {"rows": np.full((1, 2), value, np.float32)})

    async def runs(self, count: int) -> None:
        """Waits until the engine has begun so many runs."""
        await self._until(lambda: len(self.engine.runs) == count)

    async def waits(self, count: int) -> None:
        """Waits until so many requests whose callers are still there are in the queue."""
        (served,) = self._repository.versions()
        await self._until(lambda: sum(not one.answer.done() for one in served.loaded.scheduler._queue) == count)

    async def _until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not holds():  # noqa: ASYNC110  # the other side announces nothing
                await asyncio.sleep(0.005)


def servicer(repository: Repository) -> InferenceServicer:
    tracer = Tracer(TraceSettings(TraceConfig(), "", "", lambda _: None), 0)
    memory = Memory(SharedMemory(allowed=False), CudaMemory(allowed=False))
    return InferenceServicer(repository, RegistryControl(repository), memory, LogSettings(), tracer, "gated", 2**20)


@asynccontextmanager
async def gated(home: Path) -> AsyncIterator[Gated]:
    settings = InferenceSettings.load({"port": 0, "home": home, "reflection": False})
    loader = GatedLoader(max_batch_size=8, max_queue_size=QUEUE)
    repository = Repository(loader.prune, LoadMetrics(), retries=True)
    repository.apply(loader.desired(1, (1, 100)))
    loader.succeed(1)
    server = Gated(repository, loader.engines[1])
    services = [servicer(repository).service(), ServingServicer(repository).service()]
    address: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def run() -> None:
        async with listening(settings, Application(services, server.drain)) as where:
            address.set_result(where)
            await server.stop.wait()

    running = asyncio.create_task(run())
    async with grpc.aio.insecure_channel(await address) as channel:
        server.oip = GRPCInferenceServiceStub(channel)
        try:
            yield server
        finally:
            server.engine.open()
            server.stop.set()
            await running
            await repository.close()


async def failure(call: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call  # type: ignore[misc]  # grpc's call objects publish no common awaitable type
    return caught.value.code(), caught.value.details() or ""


async def test_a_deadline_that_passes_in_the_queue_runs_nothing(tmp_path: Path) -> None:
    async with gated(tmp_path) as server:
        first = server.ask(1)
        await server.runs(1)
        code, _ = await failure(server.ask(2, timeout_s=0.1))
        assert code is grpc.StatusCode.DEADLINE_EXCEEDED
        last = server.ask(3)
        await server.waits(1)
        server.engine.open()
        await asyncio.gather(first, last)
        assert [run.tolist() for run in server.engine.runs] == [[[1, 1]], [[3, 3]]]


async def test_the_parameter_timeout_bounds_the_wait_as_a_deadline_does(tmp_path: Path) -> None:
    async with gated(tmp_path) as server:
        first = server.ask(1)
        await server.runs(1)
        request = server.request(2)
        request.parameters["timeout"].int64_param = 50_000
        code, details = await failure(server.oip.ModelInfer(request))
        assert (code, "timeout of 0.05 s" in details) == (grpc.StatusCode.DEADLINE_EXCEEDED, True)
        server.engine.open()
        await first
        assert len(server.engine.runs) == 1


async def test_a_caller_that_leaves_is_not_run(tmp_path: Path) -> None:
    async with gated(tmp_path) as server:
        first = server.ask(1)
        await server.runs(1)
        gone = [server.ask(2) for _ in range(QUEUE)]
        await server.waits(QUEUE)
        code, details = await failure(server.ask(9))
        assert (code, "has 3 requests waiting" in details) == (grpc.StatusCode.UNAVAILABLE, True)
        for call in gone:
            call.cancel()
        await server.waits(0)
        last = server.ask(3)
        server.engine.open()
        await asyncio.gather(first, last)
        assert [run.tolist() for run in server.engine.runs] == [[[1, 1]], [[3, 3]]]


async def test_a_stopping_server_finishes_what_is_queued(tmp_path: Path) -> None:
    async with gated(tmp_path) as server:
        first = server.ask(1)
        await server.runs(1)
        waiting = server.ask(2)
        await server.waits(1)
        server.stop.set()
        await server.draining.wait()
        assert (await failure(server.ask(9)))[0] is grpc.StatusCode.UNAVAILABLE
        server.engine.open()
        answers = await asyncio.gather(first, waiting)
        assert [np.frombuffer(one.raw_output_contents[0], np.float32)[0] for one in answers] == [2, 4]
        assert len(server.engine.runs) == 2


async def test_a_loading_model_is_unavailable(tmp_path: Path) -> None:
    settings = InferenceSettings.load({"port": 0, "home": tmp_path, "reflection": False})
    loader = GatedLoader()
    repository = Repository(loader.prune, LoadMetrics(), retries=True)
    repository.apply(loader.desired(1, (1, 100)))

    async def drain() -> None:
        repository.drain()

    application = Application([servicer(repository).service()], drain)
    async with listening(settings, application) as address, grpc.aio.insecure_channel(address) as channel:
        oip = GRPCInferenceServiceStub(channel)
        for call in (
            oip.ModelInfer(pb.ModelInferRequest(model_name="gated")),
            oip.ModelInfer(pb.ModelInferRequest(model_name="gated", model_version="1")),
            oip.ModelMetadata(pb.ModelMetadataRequest(name="gated")),
        ):
            code, details = await failure(call)
            assert (code, "is loading" in details) == (grpc.StatusCode.UNAVAILABLE, True)
        assert not (await oip.ModelReady(pb.ModelReadyRequest(name="gated"))).ready
        assert not (await oip.ServerReady(pb.ServerReadyRequest())).ready
    await repository.close()
