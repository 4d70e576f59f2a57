"""A server of several workers as an operator starts it, a connection to each of them, and calls that tests share."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families
from tests.integration.inference import graphs
from tests.integration.inference.fleet import WAIT_S, infer_request, put_model
from tests.integration.rpc.conformance import OPTIONS

from penstock.oip import inference_pb2 as pb
from penstock.oip.inference_pb2_grpc import GRPCInferenceServiceStub

WORKERS = 3
ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


@dataclass(frozen=True)
class Server:
    """A running server. Its connections tell workers apart, its processes tell which of them is worker 0."""

    process: "subprocess.Popen[bytes]"
    folder: Path
    metrics_port: int
    address: str

    def workers(self) -> list[int]:
        """The workers' processes, worker 0's first."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in children.split()]

    def private(self) -> list[str]:
        """What the server keeps for its workers."""
        return sorted(path.name for path in (self.folder / "tmp").glob("penstock-*/*.sock"))

    def metrics(self) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}/metrics", timeout=30) as response:
            text = response.read().decode()
        return {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    @asynccontextmanager
    async def each(self) -> AsyncIterator[list[GRPCInferenceServiceStub]]:
        """A connection to each worker. The kernel chooses: fresh ones are made until all workers have answered."""
        reached: dict[str, GRPCInferenceServiceStub] = {}
        async with AsyncExitStack() as stack:
            for _ in range(200):
                channel = grpc.aio.insecure_channel(self.address, options=OPTIONS)
                await stack.enter_async_context(channel)
                stub = GRPCInferenceServiceStub(channel)
                call = stub.ServerLive(pb.ServerLiveRequest(), timeout=WAIT_S)
                # Ids of requests begin with what is a process's own.
                worker = str(dict(await call.trailing_metadata())["x-request-id"])[:16]
                reached.setdefault(worker, stub)
                if len(reached) == WORKERS:
                    break
            assert len(reached) == WORKERS
            yield list(reached.values())


@contextmanager
def started(folder: Path, transport: str) -> Iterator[Server]:
    """A server as an operator starts it; ends without an error and leaves nothing behind."""
    ready, temporary = folder / "ready", folder / "tmp"
    temporary.mkdir()
    models = folder / "models"
    put_model(models, "scale", graphs.scale(2))
    put_model(models, "torn", graphs.Bundle({"model.onnx": b"no model"}, graphs.scale(2).signature))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        metrics_port = free.getsockname()[1]
    flags = ["--repository", models, "--mode", "explicit", "--load-model", "scale", "--transport", transport]
    flags += ["--workers", str(WORKERS), "--port", "0", "--metrics-port", str(metrics_port), "--allow-client-shm"]
    flags += ["--home", folder / "home", "--ready-file", ready, "--log-level", "warning", "--intra-op-threads", "1"]
    flags += ["--trace-file", folder / "trace.json", "--drain-s", "5"]
    process = subprocess.Popen(
        [sys.executable, "-m", "penstock.cli", "serve", "inference", *flags], env={**os.environ, "TMPDIR": temporary}
    )
    try:
        limit = time.monotonic() + 60
        while not ready.exists():
            assert process.poll() is None, "the server ended before it was ready"
            assert time.monotonic() < limit
            time.sleep(0.02)
        yield Server(process, folder, metrics_port, ready.read_text(encoding="utf-8"))
    finally:
        process.terminate()
        try:
            assert process.wait(WAIT_S) == 0
        finally:
            process.kill()
    assert not list(temporary.glob("penstock-*"))


async def refused(call: Awaitable[object]) -> grpc.aio.AioRpcError:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


def said(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
    return error.code(), error.details() or ""


async def load(stub: GRPCInferenceServiceStub, model: str, timeout_s: float = 60, **parameters: str | bytes) -> None:
    request = pb.RepositoryModelLoadRequest(model_name=model)
    for key, value in parameters.items():
        if isinstance(value, bytes):
            request.parameters[key].bytes_param = value
        else:
            request.parameters[key].string_param = value
    await stub.RepositoryModelLoad(request, timeout=timeout_s)


async def unload(stub: GRPCInferenceServiceStub, model: str) -> None:
    await stub.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=model), timeout=60)


async def scaled(stub: GRPCInferenceServiceStub, model: str, rows: np.ndarray = ROWS) -> np.ndarray:
    answer = await stub.ModelInfer(infer_request(model, {"rows": rows}), timeout=WAIT_S)
    return np.frombuffer(answer.raw_output_contents[0], np.float32).reshape(rows.shape)


async def on_each(stubs: list[GRPCInferenceServiceStub], ask: Callable[[Any], Awaitable[Any]]) -> list[Any]:
    return [await ask(stub) for stub in stubs]


async def index(stub: GRPCInferenceServiceStub) -> list[tuple[str, str, str]]:
    listed = await stub.RepositoryIndex(pb.RepositoryIndexRequest())
    return [(model.name, model.version, model.state) for model in listed.models]
