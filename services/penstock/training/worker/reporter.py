"""What the training thread says, on its way to the service: events in order, and checkpoints."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.api.training.v1 import worker_service_pb2 as pb
from penstock.api.training.v1.job_pb2 import EpochMetrics, JobEvent, LogLine, LogSeverity, Phase, Progress
from penstock.client.artifacts import write_blob
from penstock.client.errors import PenstockError
from penstock.training.families.interface import StoppedError
from penstock.training.worker.link import Link

if TYPE_CHECKING:
    from penstock.api.registry.v1.artifact_service_pb2_grpc import ArtifactServiceAsyncStub

_SEND_EVERY_S = 0.25
_PROGRESS_EVERY_S = 0.25
_MAX_EVENTS = 1000
_MAX_LINE_BYTES = 8 * 1024


class Reporter:
    """Takes reports from any thread and never makes it wait for the network."""

    def __init__(
        self, link: Link, artifacts: "ArtifactServiceAsyncStub", checkpoint_interval_s: float, folder: Path
    ) -> None:
        self._link = link
        self._artifacts = artifacts
        self._checkpoint_interval_s = checkpoint_interval_s
        self._state_path = folder / "state.npz"
        self._loop = asyncio.get_running_loop()
        self._events: list[JobEvent] = []
        self._sending = asyncio.Lock()
        self._next_progress = 0.0
        self._next_checkpoint = time.monotonic() + checkpoint_interval_s
        self._checkpoint: Future[None] | None = None

    def raise_if_stopping(self) -> None:
        """Raises `StoppedError` if the job is being cancelled."""
        if self._link.cancelled.is_set():
            raise StoppedError

    def phase(self, phase: "Phase.ValueType", fraction: float = 0.0) -> None:
        """A phase begins, or has come so far; too frequent words are dropped."""
        now = time.monotonic()
        if 0 < fraction < 1 and now < self._next_progress:
            return
        self._next_progress = now + _PROGRESS_EVERY_S
        self._put(JobEvent(progress=Progress(phase=phase, fraction=fraction)))

    def progress(self, fraction: float) -> None:
        self.phase(Phase.PHASE_FIT, fraction)

    def log(self, severity: "LogSeverity.ValueType", text: str) -> None:
        """Every line of a text as a line of the job's log."""
        for line in text.splitlines():
            cut = line.encode(errors="replace")[:_MAX_LINE_BYTES].decode(errors="ignore")
            self._put(JobEvent(log_line=LogLine(severity=severity, text=cut)))

    def epoch_ended(self, metrics: EpochMetrics, write_state: Callable[[Path], None]) -> None:
        """Reports an epoch and, if it is time and the last one has arrived, makes a checkpoint."""
        self._put(JobEvent(epoch_metrics=metrics))
        busy = self._checkpoint is not None and not self._checkpoint.done()
        if busy or time.monotonic() < self._next_checkpoint:
            return
        write_state(self._state_path)
        self._next_checkpoint = time.monotonic() + self._checkpoint_interval_s
        self._checkpoint = asyncio.run_coroutine_threadsafe(self._keep_checkpoint(metrics.epoch), self._loop)

    async def send_for_ever(self) -> None:
        """Sends what has been reported, a few times a second."""
        while True:
            await asyncio.sleep(_SEND_EVERY_S)
            await self.send()

    async def send(self) -> None:
        """Sends all that has been reported so far."""
        async with self._sending:
            while self._events:
                batch = self._events[:_MAX_EVENTS]
                request = pb.RecordEventsRequest(lease=self._link.lease, events=batch)
                response = await self._link.call(self._link.stub.RecordEvents, request)
                del self._events[: len(batch)]
                self._link.take_note(response.cancel_requested)

    async def settle(self) -> None:
        """Waits for the checkpoint on its way, and sends what is left to say."""
        if self._checkpoint is not None:
            await asyncio.wrap_future(self._checkpoint)
        await self.send()

    async def _keep_checkpoint(self, epoch: int) -> None:
        try:
            blob = await write_blob(self._artifacts, self._state_path)
            checkpoint = pb.Checkpoint(epoch=epoch, content=blob)
            request = pb.RecordCheckpointRequest(lease=self._link.lease, checkpoint=checkpoint)
            await self._link.call(self._link.stub.RecordCheckpoint, request)
        except PenstockError as error:
            # The training is worth more than its checkpoint; the next epoch tries again.
            self.log(LogSeverity.LOG_SEVERITY_WARNING, f"No checkpoint after epoch {epoch}: {error.message}")

    def _put(self, event: JobEvent) -> None:
        self._loop.call_soon_threadsafe(self._events.append, event)
