"""Datasets, jobs with their events, and the audit trail."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "datasets",
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("message", sa.LargeBinary, nullable=False),
        sa.Column("content_digest", sa.String(71), nullable=False, index=True),
        sa.Column("columns_digest", sa.String(71), nullable=False, index=True),
        sa.PrimaryKeyConstraint("name", name="pk_datasets"),
    )
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("job_id", sa.String(64), nullable=False),
        sa.Column("request_id", sa.String(64), nullable=True),
        sa.Column("message", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.Integer, nullable=False, index=True),
        sa.Column("dataset", sa.String(63), nullable=False, index=True),
        sa.Column("model", sa.String(63), nullable=False, index=True),
        sa.Column("last_cursor", sa.Integer, nullable=False),
        sa.Column("secret_digest", sa.LargeBinary, nullable=True),
        sa.Column("interruptions", sa.Integer, nullable=False),
        sa.Column("checkpoint", sa.LargeBinary, nullable=True),
        sa.Column("completion", sa.LargeBinary, nullable=True),
        sa.PrimaryKeyConstraint("number", name="pk_jobs"),
        sa.UniqueConstraint("job_id", name="uq_jobs_job_id"),
        sa.UniqueConstraint("request_id", name="uq_jobs_request_id"),
    )
    op.create_table(
        "job_events",
        sa.Column("job_number", sa.Integer, nullable=False),
        sa.Column("cursor", sa.Integer, nullable=False),
        sa.Column("message", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("job_number", "cursor", name="pk_job_events"),
        sa.ForeignKeyConstraint(["job_number"], ["jobs.number"], name="fk_job_events_job_number"),
    )
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer, nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False, index=True),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(64), nullable=False, index=True),
        sa.Column("detail", sa.JSON, nullable=False),
        sa.PrimaryKeyConstraint("number", name="pk_audit"),
    )
