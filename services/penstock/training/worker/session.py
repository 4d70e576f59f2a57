"""One attempt from its start to its result."""

import asyncio
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import grpc

from penstock.api.dataset.v1.dataset_pb2 import Dataset, Split
from penstock.api.dataset.v1.dataset_service_pb2 import GetDatasetRequest
from penstock.api.dataset.v1.dataset_service_pb2_grpc import DatasetServiceStub
from penstock.api.registry.v1.artifact_service_pb2_grpc import ArtifactServiceStub
from penstock.api.training.v1 import worker_service_pb2 as pb
from penstock.api.training.v1.job_pb2 import JobError, JobErrorKind, JobSpec, LogSeverity, Phase
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.client.artifacts import read_blob, write_blob
from penstock.client.errors import PenstockError, answer
from penstock.converters import Conversion, GateError, UnsupportedModelError, convert
from penstock.training.families import family_of
from penstock.training.families.interface import (
    Column,
    DivergedError,
    Export,
    Family,
    SpecError,
    Splits,
    StoppedError,
)
from penstock.training.messages import parity_message, signature_message
from penstock.training.worker.data import read_split
from penstock.training.worker.link import LeaseLostError, Link, persistently
from penstock.training.worker.reporter import Reporter

if TYPE_CHECKING:
    from penstock.api.registry.v1.artifact_service_pb2_grpc import ArtifactServiceAsyncStub

_MAX_ERROR_CHARACTERS = 2000

Result = TypeVar("Result")


class Session:
    """Runs one attempt. All that touches the training library runs in one thread, which the library asks for."""

    def __init__(self, channel: grpc.aio.Channel, link: Link, reporter: Reporter, folder: Path) -> None:
        self._datasets = DatasetServiceStub(channel)
        self._artifacts = ArtifactServiceStub(channel)
        self._link = link
        self._reporter = reporter
        self._folder = folder
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def run(self, start: pb.StartAttemptResponse) -> None:
        """Ends the attempt, with a result or without. Raises `LeaseLostError`."""
        try:
            completion = await self._train(start)
            await self._reporter.settle()
            await self._link.call(self._link.stub.CompleteAttempt, completion)
        except LeaseLostError:
            raise
        except Exception as error:  # whatever happens, the job must hear of it
            await self._fail(error)

    async def _train(self, start: pb.StartAttemptResponse) -> pb.CompleteAttemptRequest:
        spec = start.spec
        dataset = await self._dataset(spec)
        family = family_of(spec, dataset, f"{self._link.lease.job_id}/{self._link.lease.fencing_token}")
        splits = await self._read(family, dataset)
        await self._in_thread(lambda: family.prepare(splits))
        state = await self._state(start.checkpoint) if start.HasField("checkpoint") else None
        self._reporter.phase(Phase.PHASE_FIT)
        await self._in_thread(lambda: family.build(state))
        await self._in_thread(lambda: family.fit(self._reporter))
        self._reporter.phase(Phase.PHASE_FIT, 1)
        self._reporter.phase(Phase.PHASE_EVALUATE)
        test_metrics = await self._in_thread(family.evaluate)
        self._reporter.phase(Phase.PHASE_CONVERT)
        export = await self._in_thread(lambda: family.export(self._folder))
        conversion = await self._in_thread(lambda: self._convert(export))
        files = await self._upload(
            {"model.onnx": conversion.path, "model.keras": export.source}, start.registry_address
        )
        return pb.CompleteAttemptRequest(
            lease=self._link.lease,
            files=files,
            signature=signature_message(conversion.signature),
            parity=parity_message(conversion.parity),
            test_metrics=test_metrics,
            labels=export.labels,
        )

    async def _dataset(self, spec: JobSpec) -> Dataset:
        request = GetDatasetRequest(name=spec.dataset)
        return (await persistently(lambda: answer(self._datasets.GetDataset(request)))).dataset

    async def _read(self, family: Family, dataset: Dataset) -> Splits:
        rows_read = 0

        def count(rows: int) -> None:
            nonlocal rows_read
            rows_read += rows
            self._reporter.raise_if_stopping()
            self._reporter.phase(Phase.PHASE_LOAD, rows_read / dataset.row_count)

        self._reporter.phase(Phase.PHASE_LOAD)
        splits: dict[Split.ValueType, dict[str, Column]] = {}
        for split in (Split.SPLIT_TRAIN, Split.SPLIT_VALIDATION, Split.SPLIT_TEST):
            splits[split] = await read_split(self._datasets, dataset, split, family.columns, count)
        return splits

    async def _state(self, checkpoint: pb.Checkpoint) -> Path | None:
        """The file to take the training up from; None, for a start from nothing, if it is lost."""
        path = self._folder / "resume.npz"
        try:
            await persistently(lambda: read_blob(self._artifacts, checkpoint.content, path))
        except PenstockError as error:
            text = f"The checkpoint after epoch {checkpoint.epoch} is lost; starting over. {error.message}"
            self._reporter.log(LogSeverity.LOG_SEVERITY_WARNING, text)
            return None
        return path

    def _convert(self, export: Export) -> Conversion:
        return convert(export.model, self._folder / "model.onnx", samples=export.samples)

    async def _upload(self, files: dict[str, Path], registry_address: str) -> dict[str, Blob]:
        """The bundle's files as blobs of the registry; waits for a registry that is away."""
        blobs: dict[str, Blob] = {}
        async with grpc.aio.insecure_channel(registry_address) as channel:
            stub = ArtifactServiceStub(channel)
            for number, (name, path) in enumerate(files.items()):
                self._reporter.phase(Phase.PHASE_UPLOAD, number / len(files))
                blobs[name] = await self._write(stub, path, registry_address)
        self._reporter.phase(Phase.PHASE_UPLOAD, 1)
        return blobs

    async def _write(self, stub: "ArtifactServiceAsyncStub", path: Path, registry_address: str) -> Blob:
        async def write() -> Blob:
            self._reporter.raise_if_stopping()
            try:
                return await write_blob(stub, path)
            except PenstockError as error:
                text = f"The registry at {registry_address} takes no files: {error.message}"
                self._reporter.log(LogSeverity.LOG_SEVERITY_WARNING, text)
                raise

        return await persistently(write)

    async def _fail(self, error: Exception) -> None:
        """Says why there is no result."""
        kinds = {
            SpecError: JobErrorKind.JOB_ERROR_KIND_SPEC,
            DivergedError: JobErrorKind.JOB_ERROR_KIND_DIVERGED,
            GateError: JobErrorKind.JOB_ERROR_KIND_PARITY,
        }
        known = (*kinds, UnsupportedModelError, StoppedError)
        message = str(error)[:_MAX_ERROR_CHARACTERS] or type(error).__name__
        if not isinstance(error, known):
            self._reporter.log(LogSeverity.LOG_SEVERITY_ERROR, "".join(traceback.format_exception(error)))
            message = f"{type(error).__name__}: {message} The job's log has the details."
        kind = kinds.get(type(error), JobErrorKind.JOB_ERROR_KIND_INTERNAL)
        await self._reporter.settle()
        request = pb.FailAttemptRequest(lease=self._link.lease, error=JobError(kind=kind, message=message))
        await self._link.call(self._link.stub.FailAttempt, request)

    async def _in_thread(self, work: Callable[[], Result]) -> Result:
        self._reporter.raise_if_stopping()
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)
