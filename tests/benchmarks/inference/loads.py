"""Loads and unloads of a model by request, again and again, as long as a block lasts."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import grpc
from tests.benchmarks.harness import BenchError
from tests.benchmarks.inference.models import Model
from tests.benchmarks.inference.wire import SERVICE, call

from penstock.oip import inference_pb2


def load_once(address: str, name: str) -> float:
    """Loads the model and unloads it; how long the load took, in seconds."""
    started = time.monotonic()
    _ask(address, "RepositoryModelLoad", inference_pb2.RepositoryModelLoadRequest(model_name=name).SerializeToString())
    taken = time.monotonic() - started
    unload = inference_pb2.RepositoryModelUnloadRequest(model_name=name)
    _ask(address, "RepositoryModelUnload", unload.SerializeToString())
    return taken


@contextmanager
def loads(address: str, name: str) -> Iterator[list[float]]:
    """Fills the list with the seconds of each load; the last one has ended when the block has."""
    taken: list[float] = []
    stop = threading.Event()

    def work() -> None:
        while not stop.is_set():
            taken.append(load_once(address, name))

    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        try:
            yield taken
        finally:
            stop.set()
        working.result()


def side_by_side(folder: Path, *models: Model) -> Path:
    """A repository of several models."""
    for model in models:
        (folder / model.name).symlink_to(model.repository / model.name)
    return folder


def _ask(address: str, method: str, message: bytes) -> None:
    try:
        call(address, f"/{SERVICE}/{method}", message)
    except grpc.RpcError as error:
        raise BenchError(f"{method} failed with {error.code().name}: {error.details()}") from error
