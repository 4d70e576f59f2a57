"""Transactions, snapshots and migrations on SQLite."""

import asyncio
import random
import sqlite3
import time
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from penstock.rpc.errors import StartupError, StorageFullError
from penstock.storage.database import Database, opened_database, sqlite_url

ENV = """
from alembic import context
with context.begin_transaction():
    context.run_migrations()
"""

FIRST = """
from alembic import op
import sqlalchemy as sa
revision, down_revision = "0001", None
def upgrade():
    op.create_table("parent", sa.Column("id", sa.Integer, primary_key=True), sa.Column("n", sa.Integer, nullable=False))
    op.create_table("child", sa.Column("parent", sa.Integer, sa.ForeignKey("parent.id"), nullable=False))
    op.execute("INSERT INTO parent (id, n) VALUES (1, 0)")
"""

SECOND = """
from alembic import op
revision, down_revision = "0002", "0001"
def upgrade():
    op.execute("INSERT INTO parent (id, n) VALUES (2, 0)")
    {then}
"""


def write_migrations(folder: Path, *scripts: str) -> Path:
    (folder / "versions").mkdir(parents=True, exist_ok=True)
    (folder / "env.py").write_text(ENV)
    for number, script in enumerate(scripts, 1):
        (folder / "versions" / f"{number:04}.py").write_text(script)
    return folder


@pytest.fixture
def migrations(tmp_path: Path) -> Path:
    # A percent sign means something to Alembic's configuration.
    return write_migrations(tmp_path / "100%_migrations", FIRST)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return sqlite_url(tmp_path / "database.sqlite")


@pytest.fixture
async def database(url: str, migrations: Path) -> AsyncIterator[Database]:
    async with opened_database(url, migrations) as opened:
        yield opened


async def number(database: Database) -> int:
    async with database.snapshot() as session:
        return int((await session.execute(text("SELECT n FROM parent WHERE id = 1"))).scalar_one())


async def increment(database: Database) -> None:
    """Read, let others run, write: lost updates show."""
    async with database.transaction() as session:
        found = (await session.execute(text("SELECT n FROM parent WHERE id = 1"))).scalar_one()
        await asyncio.sleep(0)
        await session.execute(text("UPDATE parent SET n = :n WHERE id = 1"), {"n": found + 1})


async def test_migrations_run_once(url: str, migrations: Path) -> None:
    for _ in range(2):
        async with opened_database(url, migrations) as database, database.snapshot() as session:
            assert (await session.execute(text("SELECT count(*) FROM parent"))).scalar_one() == 1
            assert (await session.execute(text("SELECT version_num FROM alembic_version"))).scalars().all() == ["0001"]
    write_migrations(migrations, FIRST, SECOND.format(then="pass"))
    async with opened_database(url, migrations) as database, database.snapshot() as session:
        assert (await session.execute(text("SELECT count(*) FROM parent"))).scalar_one() == 2


async def test_a_migration_that_fails_changes_nothing(url: str, migrations: Path) -> None:
    broken = SECOND.format(then='op.execute("SELECT * FROM nowhere")')
    write_migrations(migrations, FIRST, broken)
    with pytest.raises(StartupError, match="nowhere"):
        await opened_database(url, migrations).__aenter__()
    (migrations / "versions" / "0002.py").unlink()
    async with opened_database(url, migrations) as database:
        assert await number(database) == 0


async def test_a_database_of_a_newer_version_is_refused(url: str, migrations: Path) -> None:
    write_migrations(migrations, FIRST, SECOND.format(then="pass"))
    async with opened_database(url, migrations):
        pass
    (migrations / "versions" / "0002.py").unlink()
    with pytest.raises(StartupError, match=r"database\.sqlite.*0002.*newer Penstock"):
        await opened_database(url, migrations).__aenter__()


async def test_every_connection_is_durable_and_checks_foreign_keys(database: Database) -> None:
    expected = {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "busy_timeout": 10000}

    async def found(session_of: object) -> dict[str, object]:
        async with session_of() as session:  # type: ignore[operator]  # transaction or snapshot
            together.release()
            await asyncio.sleep(0.01)  # so that each has a connection of its own
            return {name: (await session.execute(text(f"PRAGMA {name}"))).scalar_one() for name in expected}

    together = asyncio.Semaphore(0)
    answers = await asyncio.gather(
        found(database.transaction), found(database.snapshot), found(database.snapshot), found(database.snapshot)
    )
    assert answers == [expected] * 4


async def test_a_foreign_key_is_enforced(database: Database) -> None:
    async def orphan() -> None:
        async with database.transaction() as session:
            await session.execute(text("INSERT INTO child (parent) VALUES (99)"))

    with pytest.raises(IntegrityError):
        await orphan()


async def test_an_exception_rolls_back(database: Database) -> None:
    async def fail() -> None:
        async with database.transaction() as session:
            await session.execute(text("UPDATE parent SET n = 7"))
            raise LookupError

    with pytest.raises(LookupError):
        await fail()
    assert await number(database) == 0
    await increment(database)
    assert await number(database) == 1


async def test_concurrent_transactions_serialize_and_are_fast(database: Database) -> None:
    started = time.monotonic()
    await asyncio.gather(*(increment(database) for _ in range(200)))
    elapsed_s = time.monotonic() - started
    assert await number(database) == 200
    # About 0.3 s where an fsync is fast. What polls inside SQLite takes many times that, or gives up.
    assert elapsed_s < 15


async def test_two_processes_worth_of_databases_serialize_too(url: str, migrations: Path) -> None:
    async with opened_database(url, migrations) as one, opened_database(url, migrations) as other:
        await asyncio.gather(*(increment(each) for _ in range(20) for each in (one, other)))
        assert await number(one) == 40


async def test_a_snapshot_is_consistent_and_waits_for_nobody(database: Database) -> None:
    async with database.snapshot() as session:
        before = (await session.execute(text("SELECT n FROM parent"))).scalar_one()
        async with database.transaction() as writer:
            await writer.execute(text("UPDATE parent SET n = 5"))
            # Neither the open transaction nor the committed one is seen, and neither makes the reader wait.
            async with asyncio.timeout(2):
                assert await number(database) == before
        assert (await session.execute(text("SELECT n FROM parent"))).scalar_one() == before
    assert await number(database) == 5


async def test_many_waiting_writers_leave_connections_to_readers(database: Database) -> None:
    async with database.transaction() as session:
        await session.execute(text("UPDATE parent SET n = 1"))
        writers = [asyncio.create_task(increment(database)) for _ in range(50)]
        await asyncio.sleep(0.05)
        async with asyncio.timeout(2):
            assert await asyncio.gather(*(number(database) for _ in range(50))) == [0] * 50
    await asyncio.gather(*writers)
    assert await number(database) == 51


async def test_a_cancelled_transaction_gives_its_lock_back(database: Database, tmp_path: Path) -> None:
    chance = random.Random(7)
    done = 0
    # Another process's view, which does not wait long for a lock that nobody releases.
    with closing(sqlite3.connect(tmp_path / "database.sqlite", timeout=1, isolation_level=None)) as other:
        for _ in range(150):
            task = asyncio.create_task(increment(database))
            await asyncio.sleep(chance.random() * 0.006)
            task.cancel()
            (result,) = await asyncio.gather(task, return_exceptions=True)
            done += result is None
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
    # A commit that was under way when it was cancelled may have happened; none can be half done.
    found = await number(database)
    assert done <= found <= 150
    await increment(database)
    assert await number(database) == found + 1


async def test_a_task_that_is_cancelled_twice_leaves_nothing_behind(database: Database) -> None:
    chance = random.Random(7)
    for _ in range(100):
        tasks = [asyncio.create_task(work(database)) for work in (increment, number, increment, number)]
        await asyncio.sleep(chance.random() * 0.004)
        for _ in range(2):
            for task in tasks:
                task.cancel()
            await asyncio.sleep(chance.random() * 0.0005)
        await asyncio.gather(*tasks, return_exceptions=True)
    # A connection that is being closed is closed by a task of its own.
    async with asyncio.timeout(20):
        await asyncio.gather(*(asyncio.all_tasks() - {asyncio.current_task()}), return_exceptions=True)
    await increment(database)


async def test_a_full_disk_is_told_from_other_faults(database: Database) -> None:
    async def fill() -> None:
        async with database.transaction() as session:
            pages = (await session.execute(text("PRAGMA page_count"))).scalar_one()
            await session.execute(text(f"PRAGMA max_page_count = {pages}"))
            await session.execute(
                text(
                    "INSERT INTO parent (n) SELECT 1 FROM (WITH RECURSIVE r(i) AS "
                    "(SELECT 1 UNION ALL SELECT i + 1 FROM r WHERE i < 10000) SELECT i FROM r)"
                )
            )

    with pytest.raises(StorageFullError, match="Free space"):
        await fill()
    assert await number(database) == 0
