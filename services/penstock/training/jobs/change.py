"""One change of one job, inside a transaction: its message, its row, its events and its audit record together."""

import hashlib
import hmac

from google.protobuf.timestamp_pb2 import Timestamp
from sqlalchemy.ext.asyncio import AsyncSession

from penstock.api.training.v1.job_pb2 import Attempt, Job, JobError, JobErrorKind, JobEvent, JobState, StateChange
from penstock.api.training.v1.worker_service_pb2 import Checkpoint, Lease
from penstock.rpc.errors import LeaseLostError
from penstock.training.jobs.spec import attempts_allowed
from penstock.training.tables import FINAL_STATES, EventRow, JobRow, audit

LEASED_STATES = frozenset({JobState.JOB_STATE_RUNNING, JobState.JOB_STATE_CANCELLING})


class JobChange:
    """What a transition does to a job. `save` must be called before the transaction ends."""

    def __init__(self, session: AsyncSession, row: JobRow) -> None:
        self._session = session
        self.row = row
        self.job = Job.FromString(row.message)
        # Checkpoints that nobody needs once this change is committed.
        self.superseded: list[str] = []

    @property
    def attempt(self) -> Attempt:
        """The newest attempt."""
        return self.job.attempts[-1]

    @property
    def leased(self) -> bool:
        return self.job.state in LEASED_STATES

    def enter(self, state: "JobState.ValueType", message: str = "") -> None:
        """Puts the job into a state."""
        self.job.state = state
        attempt = self.attempt.number if self.job.attempts and state != JobState.JOB_STATE_QUEUED else 0
        event = JobEvent(attempt=attempt, state_change=StateChange(state=state, message=message))
        audit(
            self._session,
            f"job.{JobState.Name(state).removeprefix('JOB_STATE_').lower()}",
            self.job.job_id,
            **({"message": message[:1000]} if message else {}),
        )
        self.record(event)
        if state in FINAL_STATES:
            self.job.end_time.CopyFrom(now())
            self.set_checkpoint(None)
            self.row.completion = None

    def record(self, event: JobEvent) -> None:
        """Appends an event to the job's history."""
        self.row.last_cursor += 1
        event.cursor = self.row.last_cursor
        event.time.CopyFrom(now())
        self._session.add(EventRow(job_number=self.row.number, cursor=event.cursor, message=event.SerializeToString()))

    def set_checkpoint(self, checkpoint: Checkpoint | None) -> None:
        """Replaces the point to resume from."""
        old = Checkpoint.FromString(self.row.checkpoint or b"").content.digest
        if old and (checkpoint is None or checkpoint.content.digest != old):
            self.superseded.append(old)
        self.row.checkpoint = checkpoint.SerializeToString() if checkpoint else None

    def end_attempt(self, error: JobError | None) -> None:
        """Takes the lease back."""
        self.attempt.end_time.CopyFrom(now())
        if error is not None:
            self.attempt.error.CopyFrom(error)
        self.row.secret_digest = None

    def fail(self, error: JobError) -> None:
        self.job.error.CopyFrom(error)
        self.enter(JobState.JOB_STATE_FAILED, error.message)

    def lose_worker(self, message: str, *, interrupted: bool) -> None:
        """The worker is gone; the job is queued again while it may be. `interrupted`: not held against the job."""
        if self.job.state == JobState.JOB_STATE_CANCELLING:
            self.end_attempt(cancelled())
            self.enter(JobState.JOB_STATE_CANCELLED)
            return
        error = JobError(kind=JobErrorKind.JOB_ERROR_KIND_WORKER_LOST, message=message)
        self.end_attempt(error)
        self.row.interruptions += interrupted
        allowed = attempts_allowed(self.job.spec)
        if len(self.job.attempts) - self.row.interruptions < allowed:
            self.enter(JobState.JOB_STATE_QUEUED, message)
        else:
            error.message += f" That was attempt {allowed} of {allowed}."
            self.fail(error)

    def save(self) -> None:
        self.row.message = self.job.SerializeToString()
        self.row.state = self.job.state


def require_lease(job: Job, row: JobRow, lease: Lease) -> None:
    """Raises `LeaseLostError` unless the lease is the job's current one."""
    current = (
        job.state in LEASED_STATES
        and lease.fencing_token == job.attempts[-1].number
        and hmac.compare_digest(secret_digest(lease), row.secret_digest or b"")
    )
    if not current:
        raise lease_lost(lease)


def secret_digest(lease: Lease) -> bytes:
    return hashlib.sha256(lease.secret.encode()).digest()


def now() -> Timestamp:
    stamp = Timestamp()
    stamp.GetCurrentTime()
    return stamp


def cancelled() -> JobError:
    return JobError(message="The job was cancelled.")


def lease_lost(lease: Lease) -> LeaseLostError:
    return LeaseLostError(
        f"The lease of attempt {lease.fencing_token} on job {lease.job_id[:64]!r} is not the current one. Stop."
    )
