"""A service's database: SQLite in its home by default, PostgreSQL for a fleet. SQLAlchemy and Alembic do the work."""

import asyncio
import functools
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any
from weakref import WeakSet

import aiosqlite
from alembic.config import Config
from alembic.runtime.environment import EnvironmentContext
from alembic.script import ScriptDirectory
from alembic.util import CommandError
from sqlalchemy import Connection, event
from sqlalchemy.exc import DBAPIError, OperationalError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker, create_async_engine

from penstock.rpc.errors import StartupError, StorageFullError


class Database:
    """Transactions on one database."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._writes = async_sessionmaker(engine, expire_on_commit=False)
        # SQLite takes one writer at a time. Who waits here is served in order and holds no connection; who waited
        # inside SQLite would poll, starve, and keep readers from a connection.
        self._turn = asyncio.Lock() if engine.dialect.name == "sqlite" else nullcontext()
        self._reads = async_sessionmaker(engine.execution_options(read_only=True), expire_on_commit=False)

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """Commits durably when the block ends, and changes nothing if it raises.

        Raises `StorageFullError` if the disk is full. Transactions do not nest: the inner one would wait for ever.
        """
        async with self._turn:
            try:
                async with self._writes.begin() as session:
                    yield session
            except OperationalError as error:
                if getattr(error.orig, "sqlite_errorname", "") != "SQLITE_FULL":
                    raise
                raise StorageFullError("The disk of the database is full. Free space, then try again.") from error

    @asynccontextmanager
    async def snapshot(self) -> AsyncIterator[AsyncSession]:
        """A consistent view for reading; it never waits for writers."""
        async with self._reads() as session:
            yield session


@asynccontextmanager
async def opened_database(url: str, migrations: Path) -> AsyncIterator[Database]:
    """Connects to `url`, brings the schema up to date with the scripts in `migrations`, and disconnects at the end.

    Raises `StartupError` if the URL or its driver is not there to be used, the database cannot be reached or read, or
    the schema is one that `migrations` does not know.
    """
    engine = _engine(url)
    connections = WeakSet[aiosqlite.Connection]()
    if engine.dialect.name == "sqlite":
        _configure_sqlite(engine, connections)
    try:
        try:
            async with engine.begin() as connection:
                await connection.run_sync(migrate, migrations)
        except CommandError as error:
            raise StartupError(
                f"Cannot use the database {engine.url.render_as_string()}: {error}. If a newer Penstock wrote it, run "
                f"that one."
            ) from error
        except (SQLAlchemyError, OSError) as error:
            # SQLAlchemy's own text adds the statement and a link.
            cause = error.orig if isinstance(error, DBAPIError) else error
            raise StartupError(
                f"Cannot open the database {engine.url.render_as_string()}: {cause}. Make it reachable, or restore it "
                f"from a backup."
            ) from error
        yield Database(engine)
    finally:
        await engine.dispose()
        await _stopped(connections)


def _engine(url: str) -> AsyncEngine:
    try:
        return create_async_engine(url)
    except (SQLAlchemyError, ImportError) as error:
        # The URL is not repeated: it may hold a password.
        raise StartupError(
            f"Cannot use the database URL: {error}. Expected 'postgresql+asyncpg://…', say, its driver installed."
        ) from error


def sqlite_url(path: Path) -> str:
    return f"sqlite+aiosqlite:///{path}"


def migrate(connection: Connection, migrations: Path) -> None:
    """Runs the missing migrations in the connection's transaction."""
    config = Config()
    config.set_main_option("script_location", str(migrations).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    scripts = ScriptDirectory.from_config(config)

    def upgrade(revision: Any, _: object) -> list[Any]:  # noqa: ANN401  # Alembic's own types are private
        return scripts._upgrade_revs("head", revision)  # noqa: SLF001  # as Alembic's own `upgrade` command does

    with EnvironmentContext(config, scripts, fn=upgrade) as environment:
        environment.configure(connection=connection, transactional_ddl=True, render_as_batch=True)
        environment.run_migrations()


def _configure_sqlite(engine: AsyncEngine, connections: WeakSet[aiosqlite.Connection]) -> None:
    """Write-ahead log, full durability, and transactions that are ours to begin: the driver's own begin too late."""

    @event.listens_for(engine.sync_engine, "do_connect")
    def on_do_connect(_: object, __: object, ___: object, parameters: dict[str, Any]) -> None:
        parameters["async_creator_fn"] = functools.partial(_sqlite_connection, connections)

    @event.listens_for(engine.sync_engine, "connect")
    def on_connect(connection: Any, _: object) -> None:  # noqa: ANN401  # the driver's adapter has no public type
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in ("busy_timeout = 10000", "journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "invalidate")
    def on_invalidate(connection: Any, *_: object) -> None:  # noqa: ANN401  # the driver's adapter has no public type
        # A cancelled task leaves its statement open, and a closed connection keeps its lock until that is collected.
        connection.rollback()

    @event.listens_for(engine.sync_engine, "begin")
    def on_begin(connection: Connection) -> None:
        read_only = connection.get_execution_options().get("read_only", False)
        connection.exec_driver_sql("BEGIN" if read_only else "BEGIN IMMEDIATE")


async def _sqlite_connection(
    connections: WeakSet[aiosqlite.Connection],
    *arguments: Any,  # noqa: ANN401  # what SQLAlchemy passes on
    **parameters: Any,  # noqa: ANN401
) -> aiosqlite.Connection:
    """An open connection that can be stopped twice, and that is closed if nobody waits for it any more.

    SQLAlchemy stops a connection again when a task is cancelled a second time, while it closes; aiosqlite never answers
    the second stop, because the thread that would answer has ended, and the closing task would wait for ever.
    """
    connection = aiosqlite.connect(*arguments, **parameters)
    connection._thread.daemon = True  # noqa: SLF001  # as SQLAlchemy does with connections that it makes itself
    connection.stop = functools.cache(connection.stop)  # type: ignore[method-assign]  # see above
    connections.add(connection)
    opening = asyncio.ensure_future(connection)
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        # The thread opens the file all the same.
        opening.add_done_callback(lambda opened: opened.cancelled() or opened.exception() or connection.stop())
        raise


async def _stopped(connections: WeakSet[aiosqlite.Connection]) -> None:
    """Waits for the connections that a cancelled task left to close themselves: for a lock, at the longest."""
    stops = [stop for connection in connections if (stop := connection.stop()) is not None]
    if stops:
        await asyncio.wait(stops, timeout=15)
