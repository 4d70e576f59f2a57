"""The blocking client: the asynchronous one, on an event loop in a thread of its own."""

import asyncio
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from penstock.api.dataset.v1 import dataset_pb2
from penstock.api.inference.v1 import serving_service_pb2
from penstock.api.registry.v1 import deployment_service_pb2, model_pb2
from penstock.api.training.v1 import job_pb2, training_service_pb2
from penstock.client.aio import AsyncClient
from penstock.client.artifacts import Progress, unobserved
from penstock.client.channel import Addresses
from penstock.client.inference import InferResult
from penstock.client.tensors import Array

T = TypeVar("T")


class Client:
    """All services of one Penstock, for code that is not asynchronous. Safe to share between threads.

    Each method does what the one of its name in `AsyncClient` does. Use it as
    `with Client() as penstock: penstock.models.list()`.
    """

    def __init__(self, addresses: Addresses | None = None) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="penstock-client", daemon=True)
        self._thread.start()
        self._client = self.wait(_made(addresses))
        self.datasets = Datasets(self)
        self.jobs = Jobs(self)
        self.models = Models(self)
        self.deployments = Deployments(self)
        self.inference = Inference(self)

    @property
    def asynchronous(self) -> AsyncClient:
        """The client that does the work; await its methods only through `wait`."""
        return self._client

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Runs a coroutine on the client's loop and returns what it returns. A Ctrl-C cancels it."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def iterate(self, stream: AsyncIterator[T]) -> Iterator[T]:
        """The items of an asynchronous stream."""

        async def following() -> tuple[bool, T | None]:
            async for item in stream:
                return True, item
            return False, None

        while True:
            more, item = self.wait(following())
            if not more:
                return
            yield item  # type: ignore[misc]  # an item there is, be it None

    def close(self) -> None:
        if self._loop.is_running():
            self.wait(self._client.close())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
            self._loop.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


async def _made(addresses: Addresses | None) -> AsyncClient:
    """Channels belong to the loop they are made on."""
    return AsyncClient(addresses)


class Datasets:
    """`AsyncDatasets`, blocking."""

    def __init__(self, client: Client) -> None:
        self._wait, self._datasets = client.wait, client.asynchronous.datasets

    def create(self, dataset: dataset_pb2.Dataset, path: Path, progress: Progress = unobserved) -> dataset_pb2.Dataset:
        return self._wait(self._datasets.create(dataset, path, progress))

    def get(self, name: str) -> dataset_pb2.Dataset:
        return self._wait(self._datasets.get(name))

    def list(self) -> Sequence[dataset_pb2.Dataset]:
        return self._wait(self._datasets.list())

    def delete(self, name: str) -> None:
        self._wait(self._datasets.delete(name))

    def read(self, name: str, split: "dataset_pb2.Split.ValueType", columns: Sequence[str] = ()) -> Mapping[str, Array]:
        return self._wait(self._datasets.read(name, split, columns))


class Jobs:
    """`AsyncJobs`, blocking."""

    def __init__(self, client: Client) -> None:
        self._client, self._jobs = client, client.asynchronous.jobs

    def create(self, spec: job_pb2.JobSpec, request_id: str = "") -> job_pb2.Job:
        return self._client.wait(self._jobs.create(spec, request_id))

    def get(self, job_id: str) -> job_pb2.Job:
        return self._client.wait(self._jobs.get(job_id))

    def list(self, job_filter: training_service_pb2.JobFilter | None = None) -> Sequence[job_pb2.Job]:
        return self._client.wait(self._jobs.list(job_filter))

    def cancel(self, job_id: str) -> job_pb2.Job:
        return self._client.wait(self._jobs.cancel(job_id))

    def watch(self, job_id: str, after_cursor: int = 0) -> Iterator[job_pb2.JobEvent]:
        return self._client.iterate(self._jobs.watch(job_id, after_cursor))


class Models:
    """`AsyncModels`, blocking."""

    def __init__(self, client: Client) -> None:
        self._wait, self._models = client.wait, client.asynchronous.models

    def create(self, name: str, description: str = "") -> model_pb2.Model:
        return self._wait(self._models.create(name, description))

    def get(self, name: str) -> model_pb2.Model:
        return self._wait(self._models.get(name))

    def list(self) -> Sequence[model_pb2.Model]:
        return self._wait(self._models.list())

    def delete(self, name: str) -> None:
        self._wait(self._models.delete(name))

    def create_version(
        self,
        version: model_pb2.Version,
        files: Mapping[str, Path],
        request_id: str = "",
        progress: Progress = unobserved,
    ) -> model_pb2.Version:
        return self._wait(self._models.create_version(version, files, request_id, progress))

    def get_version(self, model: str, number: int | None = None, alias: str | None = None) -> model_pb2.Version:
        return self._wait(self._models.get_version(model, number, alias))

    def list_versions(self, model: str) -> Sequence[model_pb2.Version]:
        return self._wait(self._models.list_versions(model))

    def delete_version(self, model: str, number: int) -> None:
        self._wait(self._models.delete_version(model, number))

    def download(self, version: model_pb2.Version, folder: Path, progress: Progress = unobserved) -> None:
        self._wait(self._models.download(version, folder, progress))

    def set_alias(
        self, model: str, alias: str, version: int, reason: str = "", expected_version: int | None = None
    ) -> model_pb2.Alias:
        return self._wait(self._models.set_alias(model, alias, version, reason, expected_version))

    def list_aliases(self, model: str) -> Sequence[model_pb2.Alias]:
        return self._wait(self._models.list_aliases(model))

    def list_alias_moves(self, model: str, alias: str) -> Sequence[model_pb2.AliasMove]:
        return self._wait(self._models.list_alias_moves(model, alias))

    def delete_alias(self, model: str, alias: str, reason: str = "") -> None:
        self._wait(self._models.delete_alias(model, alias, reason))


class Deployments:
    """`AsyncDeployments`, blocking."""

    def __init__(self, client: Client) -> None:
        self._wait, self._deployments = client.wait, client.asynchronous.deployments

    def set(self, deployment: deployment_service_pb2.Deployment) -> deployment_service_pb2.Deployment:
        return self._wait(self._deployments.set(deployment))

    def get(self, model: str) -> deployment_service_pb2.Deployment:
        return self._wait(self._deployments.get(model))

    def list(self) -> Sequence[deployment_service_pb2.Deployment]:
        return self._wait(self._deployments.list())

    def delete(self, model: str) -> None:
        self._wait(self._deployments.delete(model))

    def serving(self, model: str = "") -> Sequence[serving_service_pb2.ServedVersion]:
        return self._wait(self._deployments.serving(model))


class Inference:
    """`AsyncInference`, blocking: what a program that only asks for answers needs."""

    def __init__(self, client: Client) -> None:
        self._wait, self._inference = client.wait, client.asynchronous.inference

    def infer(
        self,
        model: str,
        inputs: Mapping[str, Array],
        version: str = "",
        outputs: Sequence[str] = (),
        timeout_s: float | None = None,
    ) -> InferResult:
        return self._wait(self._inference.infer(model, inputs, version, outputs, timeout_s))

    def is_server_ready(self) -> bool:
        return self._wait(self._inference.is_server_ready())

    def is_model_ready(self, model: str, version: str = "") -> bool:
        return self._wait(self._inference.is_model_ready(model, version))
