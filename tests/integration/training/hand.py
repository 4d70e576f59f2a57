"""A worker that the test plays itself: the service starts no process, and hands its lease to the test."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.integration.registry.registries import blob_of
from tests.integration.training.trainings import Training

from penstock.api.registry.v1 import artifact_service_pb2
from penstock.api.training.v1 import worker_service_pb2 as pb
from penstock.api.training.v1.job_pb2 import EpochMetrics, JobError, JobErrorKind, JobEvent
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.api.types.v1.parity_pb2 import ParityCase, ParityReport
from penstock.api.types.v1.signature_pb2 import Dimension, Signature, TensorSpec
from penstock.training.jobs.process import Output

GRAPH = b"the bytes of a graph"


class HandProcess:
    """Stands for a worker's process: it ends when the test says so."""

    def __init__(self, lease: pb.Lease) -> None:
        self.lease = lease
        self.ended = asyncio.Event()
        self.killed = asyncio.Event()

    async def wait(self) -> str:
        await self.ended.wait()
        return "exited with code 7"

    def kill(self) -> None:
        self.killed.set()


@dataclass
class Hands:
    """Every worker that the service has started, in order."""

    started: asyncio.Queue[HandProcess] = field(default_factory=asyncio.Queue)

    @asynccontextmanager
    async def worker_process(
        self, address: str, lease: pb.Lease, checkpoint_interval_s: float, folder: Path, output: Output
    ) -> AsyncIterator[HandProcess]:
        """In the place of `penstock.training.jobs.process.worker_process`."""
        process = HandProcess(lease)
        self.started.put_nowait(process)
        try:
            yield process
        finally:
            process.kill()

    async def next(self) -> HandProcess:
        return await asyncio.wait_for(self.started.get(), 10)


@dataclass(frozen=True)
class HandWorker:
    """What a worker says, for one lease."""

    training: Training
    lease: pb.Lease

    async def start(self) -> pb.StartAttemptResponse:
        return await self.training.workers.StartAttempt(pb.StartAttemptRequest(lease=self.lease))

    async def heartbeat(self) -> bool:
        return (await self.training.workers.Heartbeat(pb.HeartbeatRequest(lease=self.lease))).cancel_requested

    async def record(self, *events: JobEvent) -> bool:
        request = pb.RecordEventsRequest(lease=self.lease, events=events)
        return (await self.training.workers.RecordEvents(request)).cancel_requested

    async def checkpoint(self, epoch: int, content: bytes) -> None:
        await store(self.training.artifacts, content)
        await self.name_checkpoint(epoch, blob_of(content))

    async def name_checkpoint(self, epoch: int, blob: Blob) -> None:
        checkpoint = pb.Checkpoint(epoch=epoch, content=blob)
        await self.training.workers.RecordCheckpoint(
            pb.RecordCheckpointRequest(lease=self.lease, checkpoint=checkpoint)
        )

    async def complete(self, **fields: Any) -> None:
        await self.training.workers.CompleteAttempt(completion(self.lease, **fields))

    async def fail(self, kind: "JobErrorKind.ValueType", message: str) -> None:
        request = pb.FailAttemptRequest(lease=self.lease, error=JobError(kind=kind, message=message))
        await self.training.workers.FailAttempt(request)


def completion(lease: pb.Lease, **fields: Any) -> pb.CompleteAttemptRequest:
    """A result on `flowers`, with some of its fields replaced."""
    batch = Dimension(name="batch")
    signature = Signature(
        inputs=[TensorSpec(name="features", datatype="FP32", shape=[batch, Dimension(size=4)])],
        outputs=[TensorSpec(name="probabilities", datatype="FP32", shape=[batch, Dimension(size=3)])],
    )
    case = ParityCase(output="probabilities", rows="sample", batch_size=2, argmax_agreement=1)
    return pb.CompleteAttemptRequest(
        **{
            "lease": lease,
            "files": {"model.onnx": blob_of(GRAPH)},
            "signature": signature,
            "parity": ParityReport(cases=[case], absolute_tolerance=1e-5, relative_tolerance=1e-4),
            "test_metrics": {"accuracy": 0.75, "loss": 0.5},
            "labels": ["iris", "lily", "rose"],
            **fields,
        }
    )


def epoch_event(epoch: int) -> JobEvent:
    return JobEvent(epoch_metrics=EpochMetrics(epoch=epoch, epoch_count=1000, values={"loss": 1 / epoch}))


async def store(artifacts: Any, data: bytes) -> None:
    """Writes a blob."""
    header = artifact_service_pb2.WriteHeader(blob=blob_of(data))
    requests = [artifact_service_pb2.WriteRequest(header=header), artifact_service_pb2.WriteRequest(chunk=data)]
    await artifacts.Write(requests)
