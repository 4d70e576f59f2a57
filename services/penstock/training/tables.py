"""What the training service keeps in its database.

Messages of the contract are stored serialized; beside them stand only the columns that are queried.
"""

from datetime import UTC, datetime
from typing import Any

import structlog
from sqlalchemy import JSON, DateTime, ForeignKey, LargeBinary, MetaData, String
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from penstock.api.training.v1.job_pb2 import JobState

FINAL_STATES = frozenset({JobState.JOB_STATE_SUCCEEDED, JobState.JOB_STATE_FAILED, JobState.JOB_STATE_CANCELLED})


class Base(DeclarativeBase):
    """The tables of the training service. Constraints have names, by which a later migration can change them."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class DatasetRow(Base):
    __tablename__ = "datasets"

    name: Mapped[str] = mapped_column(String(63), primary_key=True)
    # penstock.api.dataset.v1.Dataset
    message: Mapped[bytes] = mapped_column(LargeBinary)
    content_digest: Mapped[str] = mapped_column(String(71), index=True)
    # The parsed rows: see `penstock.training.datasets.columns`.
    columns_digest: Mapped[str] = mapped_column(String(71), index=True)


class JobRow(Base):
    __tablename__ = "jobs"

    # In the order of creation.
    number: Mapped[int] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(String(64), unique=True)
    request_id: Mapped[str | None] = mapped_column(String(64), unique=True)
    # penstock.api.training.v1.Job
    message: Mapped[bytes] = mapped_column(LargeBinary)
    state: Mapped[int] = mapped_column(index=True)
    dataset: Mapped[str] = mapped_column(String(63), index=True)
    model: Mapped[str] = mapped_column(String(63), index=True)
    last_cursor: Mapped[int] = mapped_column(default=0)
    # sha256 of the secret of the attempt that runs; the secret itself is its worker's alone.
    secret_digest: Mapped[bytes | None] = mapped_column(LargeBinary)
    # Attempts that a restart of the service ended: no fault of the job, so they do not count against it.
    interruptions: Mapped[int] = mapped_column(default=0)
    # penstock.api.training.v1.Checkpoint
    checkpoint: Mapped[bytes | None] = mapped_column(LargeBinary)
    # penstock.api.training.v1.CompleteAttemptRequest, without its lease
    completion: Mapped[bytes | None] = mapped_column(LargeBinary)


class EventRow(Base):
    __tablename__ = "job_events"

    job_number: Mapped[int] = mapped_column(ForeignKey("jobs.number"), primary_key=True)
    cursor: Mapped[int] = mapped_column(primary_key=True)
    # penstock.api.training.v1.JobEvent
    message: Mapped[bytes] = mapped_column(LargeBinary)


class AuditRow(Base):
    __tablename__ = "audit"

    number: Mapped[int] = mapped_column(primary_key=True)
    time: Mapped[datetime] = mapped_column(DateTime(timezone=True), index=True)
    # Of the call that made the change; empty for what the service did by itself.
    request_id: Mapped[str] = mapped_column(String(64))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(64), index=True)
    detail: Mapped[dict[str, Any]] = mapped_column(JSON)


def audit(session: AsyncSession, action: str, subject: str, **detail: str | int) -> None:
    """Records a change in the transaction that makes it."""
    request_id = structlog.contextvars.get_contextvars().get("request_id", "")
    now = datetime.now(UTC)
    session.add(AuditRow(time=now, request_id=request_id, action=action, subject=subject, detail=detail))
