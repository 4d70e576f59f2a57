"""The training service as a whole: what it opens, serves and closes."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc

from penstock.rpc.server import Application
from penstock.storage.artifacts import ArtifactServicer
from penstock.storage.blobs import open_blobs
from penstock.storage.database import opened_database, sqlite_url
from penstock.storage.home import locked_home
from penstock.training.datasets.servicer import DatasetServicer
from penstock.training.datasets.store import DatasetStore
from penstock.training.jobs.bell import Bell
from penstock.training.jobs.lifecycle import Lifecycle
from penstock.training.jobs.registration import Registrar
from penstock.training.jobs.scheduler import Scheduler
from penstock.training.jobs.service import Jobs
from penstock.training.jobs.servicer import TrainingServicer, WorkerServicer
from penstock.training.jobs.store import JobStore
from penstock.training.settings import TrainingSettings

MIGRATIONS = Path(__file__).parent / "migrations"


@asynccontextmanager
async def application(settings: TrainingSettings) -> AsyncIterator[Application]:
    """Opens the home, the blobs and the database, takes up the jobs that were left, and closes all at the end.

    Raises `StartupError` if the home, the blobs or the database cannot be had.
    """
    async with AsyncExitStack() as stack:
        home = stack.enter_context(locked_home(settings.service_home))
        uploads, checkpoints = (
            open_blobs(home / name, _below(settings.blob_url, name)) for name in ("datasets", "checkpoints")
        )
        url = settings.database_url.get_secret_value() if settings.database_url else sqlite_url(home / "training.db")
        database = await stack.enter_async_context(opened_database(url, MIGRATIONS))
        registry = await stack.enter_async_context(grpc.aio.insecure_channel(settings.registry))

        bell = Bell()
        datasets = DatasetStore(database, uploads, home / "parsing")
        stack.push_async_callback(datasets.close)
        store = JobStore(database, checkpoints, bell)
        lifecycle = Lifecycle(store, checkpoints)
        registrar = Registrar(lifecycle, registry)
        stack.push_async_callback(registrar.close)
        scheduler = Scheduler(lifecycle, settings, home / "workers")
        stack.push_async_callback(scheduler.stop)
        jobs = Jobs(datasets, store, lifecycle, scheduler, registrar, bell)

        for job_id in await lifecycle.recover():
            registrar.begin(job_id)
        servicers = (
            DatasetServicer(datasets),
            TrainingServicer(jobs, store),
            WorkerServicer(jobs, settings),
            ArtifactServicer(checkpoints),
        )

        async def drain() -> None:
            bell.drain()
            # A worker that reads its dataset would keep the server from stopping.
            await scheduler.stop()

        yield Application([servicer.service() for servicer in servicers], drain, scheduler.start)


def _below(url: str | None, name: str) -> str | None:
    return f"{url.rstrip('/')}/{name}" if url else None
