"""Datasets, jobs with their events, and the audit trail."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "datasets",
        sa.Column("name", sa.String(63), primary_key=True),
        sa.Column("message", sa.LargeBinary, nullable=False),
        sa.Column("content_digest", sa.String(71), nullable=False, index=True),
        sa.Column("columns_digest", sa.String(71), nullable=False, index=True),
    )
    op.create_table(
        "jobs",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("job_id", sa.String(64), nullable=False, unique=True),
        sa.Column("request_id", sa.String(64), nullable=True, unique=True),
        sa.Column("message", sa.LargeBinary, nullable=False),
        sa.Column("state", sa.Integer, nullable=False, index=True),
        sa.Column("dataset", sa.String(63), nullable=False, index=True),
        sa.Column("model", sa.String(63), nullable=False, index=True),
        sa.Column("last_cursor", sa.Integer, nullable=False),
        sa.Column("secret_digest", sa.LargeBinary, nullable=True),
        sa.Column("interruptions", sa.Integer, nullable=False),
        sa.Column("checkpoint", sa.LargeBinary, nullable=True),
        sa.Column("completion", sa.LargeBinary, nullable=True),
    )
    op.create_table(
        "job_events",
        sa.Column("job_number", sa.Integer, sa.ForeignKey("jobs.number"), primary_key=True),
        sa.Column("cursor", sa.Integer, primary_key=True),
        sa.Column("message", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "audit",
        sa.Column("number", sa.Integer, primary_key=True),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False, index=True),
        sa.Column("request_id", sa.String(64), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(64), nullable=False, index=True),
        sa.Column("detail", sa.JSON, nullable=False),
    )
