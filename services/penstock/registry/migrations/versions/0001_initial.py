"""The tables of the first release."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Creates the tables, and the one row that every change locks."""
    state = op.create_table(
        "state",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("revision", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_state"),
    )
    op.bulk_insert(state, [{"id": 1, "revision": 0}])
    op.create_table(
        "models",
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("latest_version", sa.BigInteger(), nullable=False),
        sa.Column("create_time_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_models"),
    )
    _create_version_tables()
    _create_alias_tables()
    op.create_table(
        "deployments",
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("model", name="pk_deployments"),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name="fk_deployments_models"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("time_us", sa.BigInteger(), nullable=False),
        sa.Column("request_id", sa.String(64)),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("resource", sa.String(160), nullable=False),
        sa.Column("before", sa.JSON()),
        sa.Column("after", sa.JSON()),
        sa.PrimaryKeyConstraint("id", name="pk_audit"),
    )


def _create_version_tables() -> None:
    op.create_table(
        "versions",
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("request_id", sa.String(64)),
        sa.Column("content", sa.LargeBinary(), nullable=False),
        sa.PrimaryKeyConstraint("model", "number", name="pk_versions"),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name="fk_versions_models"),
        sa.UniqueConstraint("request_id", name="uq_versions_request_id"),
    )
    op.create_table(
        "version_blobs",
        sa.Column("digest", sa.String(71), nullable=False),
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("number", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.PrimaryKeyConstraint("digest", "model", "number", name="pk_version_blobs"),
        sa.ForeignKeyConstraint(
            ["model", "number"], ["versions.model", "versions.number"], name="fk_version_blobs_versions"
        ),
    )
    op.create_index("ix_version_blobs_model_number", "version_blobs", ["model", "number"])


def _create_alias_tables() -> None:
    op.create_table(
        "aliases",
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("name", sa.String(63), nullable=False),
        sa.Column("version", sa.BigInteger(), nullable=False),
        sa.Column("update_time_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("model", "name", name="pk_aliases"),
        sa.ForeignKeyConstraint(
            ["model", "version"], ["versions.model", "versions.number"], name="fk_aliases_versions"
        ),
    )
    op.create_table(
        "alias_moves",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("model", sa.String(63), nullable=False),
        sa.Column("alias", sa.String(63), nullable=False),
        sa.Column("from_version", sa.BigInteger(), nullable=False),
        sa.Column("to_version", sa.BigInteger(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("time_us", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_alias_moves"),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name="fk_alias_moves_models"),
    )
    op.create_index("ix_alias_moves_model_alias_id", "alias_moves", ["model", "alias", "id"])
