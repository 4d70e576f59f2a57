"""The migrations make the very tables that the code expects."""

from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from penstock.storage.database import migrate
from penstock.training.app import MIGRATIONS
from penstock.training.tables import Base


def test_the_migrated_schema_is_that_of_the_tables(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/training.db")
    with engine.begin() as connection:
        migrate(connection, MIGRATIONS)

        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) == []

        # A comparison that sees nothing would be empty, too.
        connection.exec_driver_sql("ALTER TABLE jobs ADD COLUMN forgotten TEXT")
        assert compare_metadata(MigrationContext.configure(connection), Base.metadata) != []
    engine.dispose()


def test_every_constraint_has_a_name(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/training.db")
    with engine.begin() as connection:
        migrate(connection, MIGRATIONS)
        statements = [row[0] for row in connection.exec_driver_sql("SELECT sql FROM sqlite_master") if row[0]]
    engine.dispose()

    named = {str(constraint.name) for table in Base.metadata.tables.values() for constraint in table.constraints}
    assert all(f"CONSTRAINT {name} " in "\n".join(statements) for name in named)
