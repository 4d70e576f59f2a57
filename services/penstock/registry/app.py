"""The registry as a whole: what it opens, serves and closes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from penstock.registry.deployment_servicer import DeploymentServicer
from penstock.registry.desired import DesiredState
from penstock.registry.registry_servicer import RegistryServicer
from penstock.registry.settings import RegistrySettings
from penstock.registry.store import Store
from penstock.rpc.server import Application
from penstock.storage.artifacts import ArtifactServicer
from penstock.storage.blobs import open_blobs
from penstock.storage.database import opened_database, sqlite_url
from penstock.storage.home import locked_home

MIGRATIONS = Path(__file__).parent / "migrations"


@asynccontextmanager
async def application(settings: RegistrySettings) -> AsyncIterator[Application]:
    """Opens the home, the blobs and the database, and closes them at the end.

    Raises `StartupError` if one of them cannot be had.
    """
    with locked_home(settings.service_home) as home:
        blobs = open_blobs(home, settings.blob_url)
        url = settings.database_url.get_secret_value() if settings.database_url else sqlite_url(home / "registry.db")
        async with opened_database(url, MIGRATIONS) as database:
            desired = DesiredState(database)
            store = Store(database, desired.wake)
            servicers = (RegistryServicer(store, blobs), DeploymentServicer(store, desired), ArtifactServicer(blobs))
            async with desired.polling():
                yield Application([servicer.service() for servicer in servicers], desired.drain)
