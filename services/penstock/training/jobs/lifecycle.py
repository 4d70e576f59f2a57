"""The transitions of a job's state machine. Each is one transaction with its events and its audit record."""

import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

from penstock.api.training.v1.job_pb2 import (
    Attempt,
    Job,
    JobError,
    JobErrorKind,
    JobEvent,
    JobResult,
    JobState,
    LogLine,
)
from penstock.api.training.v1.worker_service_pb2 import (
    Checkpoint,
    CompleteAttemptRequest,
    Lease,
    StartAttemptResponse,
)
from penstock.rpc.errors import NotFoundError, WrongStateError
from penstock.storage.blobs import BlobStore
from penstock.training.jobs.change import JobChange, cancelled, lease_lost, now, require_lease, secret_digest
from penstock.training.jobs.store import JobStore
from penstock.training.tables import FINAL_STATES, JobRow

_INTERRUPTED = "The training service was restarted; the job goes on from its last checkpoint."


class Lifecycle:
    """Moves jobs from state to state."""

    def __init__(self, store: JobStore, checkpoints: BlobStore) -> None:
        self._store = store
        self._checkpoints = checkpoints

    async def recover(self) -> list[str]:
        """Queues again what a stopped service left running, and tells which jobs wait for their registration.

        The workers of a service that is gone end by themselves; their leases are void from here on.
        """
        for job_id in await self._store.in_states(JobState.JOB_STATE_RUNNING, JobState.JOB_STATE_CANCELLING):
            async with self._store.changing(job_id) as change:
                change.lose_worker(_INTERRUPTED, interrupted=True)
        return await self._store.in_states(JobState.JOB_STATE_REGISTERING)

    async def next_lease(self) -> Lease | None:
        """Begins an attempt at the job that has waited longest; None if none waits."""
        for job_id in await self._store.in_states(JobState.JOB_STATE_QUEUED):
            async with self._store.changing(job_id) as change:
                if change.job.state == JobState.JOB_STATE_QUEUED:
                    return _begin_attempt(change)
        return None

    async def cancel(self, job_id: str) -> Job:
        """Raises `NotFoundError`, or `WrongStateError` if it is too late."""
        async with self._store.changing(job_id) as change:
            match change.job.state:
                case JobState.JOB_STATE_QUEUED:
                    change.enter(JobState.JOB_STATE_CANCELLED)
                case JobState.JOB_STATE_RUNNING:
                    change.enter(JobState.JOB_STATE_CANCELLING)
                case JobState.JOB_STATE_CANCELLING | JobState.JOB_STATE_CANCELLED:
                    pass
                case state:
                    name = JobState.Name(state).removeprefix("JOB_STATE_")
                    raise WrongStateError(f"Job {job_id} is {name}; only a job that waits or runs can be cancelled.")
        return change.job

    async def start(self, lease: Lease) -> StartAttemptResponse:
        """What the attempt's worker is to do; lease duration and registry are the caller's to add.

        Like all that follow, it raises `LeaseLostError` if the lease is not the job's current one.
        """
        job, row = await self._leased(lease)
        checkpoint = Checkpoint.FromString(row.checkpoint) if row.checkpoint else None
        return StartAttemptResponse(spec=job.spec, checkpoint=checkpoint)

    async def cancel_requested(self, lease: Lease) -> bool:
        job, _ = await self._leased(lease)
        return job.state == JobState.JOB_STATE_CANCELLING

    async def record(self, lease: Lease, events: Sequence[JobEvent]) -> bool:
        """Appends a worker's events, and tells whether the job is being cancelled."""
        async with self._changing(lease) as change:
            for event in events:
                event.attempt = change.attempt.number
                change.record(event)
            return change.job.state == JobState.JOB_STATE_CANCELLING

    async def record_output(self, job_id: str, attempt: int, lines: Sequence[LogLine]) -> None:
        """Appends what a worker's process wrote, unless the job has ended."""
        async with self._store.changing(job_id) as change:
            if change.job.state not in FINAL_STATES:
                for line in lines:
                    change.record(JobEvent(attempt=attempt, log_line=line))

    async def record_checkpoint(self, lease: Lease, checkpoint: Checkpoint) -> None:
        """Raises `NotFoundError` if the checkpoint's blob is not there."""
        content = checkpoint.content
        if await self._checkpoints.size(content.digest) != content.size_bytes:
            raise NotFoundError("blob", content.digest)
        async with self._changing(lease) as change:
            change.set_checkpoint(checkpoint)

    async def complete(self, lease: Lease, completion: CompleteAttemptRequest) -> bool:
        """Takes an attempt's result, and tells whether it is to be registered: not if the job is being cancelled."""
        async with self._changing(lease) as change:
            if change.job.state == JobState.JOB_STATE_CANCELLING:
                change.end_attempt(cancelled())
                change.enter(JobState.JOB_STATE_CANCELLED)
                return False
            change.end_attempt(None)
            change.row.completion = completion.SerializeToString()
            change.enter(JobState.JOB_STATE_REGISTERING)
            return True

    async def fail(self, lease: Lease, error: JobError) -> None:
        """Ends an attempt without a result, and the job with it."""
        async with self._changing(lease) as change:
            if change.job.state == JobState.JOB_STATE_CANCELLING:
                change.end_attempt(cancelled())
                change.enter(JobState.JOB_STATE_CANCELLED)
            else:
                change.end_attempt(error)
                change.fail(error)

    async def lose_worker(self, job_id: str, attempt: int, message: str) -> None:
        """Settles an attempt whose worker is gone; nothing if the worker had ended it."""
        async with self._store.changing(job_id) as change:
            if change.leased and change.attempt.number == attempt:
                change.lose_worker(message, interrupted=False)

    async def completion(self, job_id: str) -> tuple[Job, CompleteAttemptRequest] | None:
        """What waits to be registered; None if the job waits for nothing."""
        job, row = await self._store.look(job_id)
        if job.state != JobState.JOB_STATE_REGISTERING or row.completion is None:
            return None
        return job, CompleteAttemptRequest.FromString(row.completion)

    async def registered(self, job_id: str, version: int) -> None:
        """Ends a job that was registered."""
        async with self._store.changing(job_id) as change:
            completion = CompleteAttemptRequest.FromString(change.row.completion or b"")
            attempt = change.attempt
            result = JobResult(
                model=change.job.spec.registration.model,
                version=version,
                signature=completion.signature,
                parity=completion.parity,
                test_metrics=completion.test_metrics,
                labels=completion.labels,
            )
            result.train_duration.FromNanoseconds(attempt.end_time.ToNanoseconds() - attempt.start_time.ToNanoseconds())
            change.job.result.CopyFrom(result)
            change.enter(JobState.JOB_STATE_SUCCEEDED, f"Registered as version {version} of {result.model}.")

    async def registration_refused(self, job_id: str, message: str) -> None:
        """Ends a job whose version the registry does not take."""
        async with self._store.changing(job_id) as change:
            change.fail(JobError(kind=JobErrorKind.JOB_ERROR_KIND_REGISTRATION, message=message))

    async def _leased(self, lease: Lease) -> tuple[Job, JobRow]:
        try:
            job, row = await self._store.look(lease.job_id)
        except NotFoundError:
            raise lease_lost(lease) from None
        require_lease(job, row, lease)
        return job, row

    @asynccontextmanager
    async def _changing(self, lease: Lease) -> AsyncIterator[JobChange]:
        await self._leased(lease)
        async with self._store.changing(lease.job_id) as change:
            require_lease(change.job, change.row, lease)
            yield change


def _begin_attempt(change: JobChange) -> Lease:
    lease = Lease(
        job_id=change.job.job_id, fencing_token=len(change.job.attempts) + 1, secret=secrets.token_urlsafe(32)
    )
    change.row.secret_digest = secret_digest(lease)
    resumed = Checkpoint.FromString(change.row.checkpoint).epoch if change.row.checkpoint else 0
    change.job.attempts.append(Attempt(number=lease.fencing_token, start_time=now(), resumed_epoch=resumed))
    change.enter(JobState.JOB_STATE_RUNNING, f"Resumes after epoch {resumed}." if resumed else "")
    return lease
