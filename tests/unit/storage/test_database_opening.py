"""What an operator reads when a database cannot be opened."""

from pathlib import Path

import pytest

from penstock.registry.app import MIGRATIONS
from penstock.rpc.errors import StartupError
from penstock.storage.database import opened_database, sqlite_url


@pytest.mark.parametrize("url", ["nonsense", "sqlite:///no-async-driver.db", "unknown+driver://host/database"])
async def test_url_that_cannot_be_used(url: str) -> None:
    with pytest.raises(StartupError, match="Cannot use the database URL"):
        async with opened_database(url, MIGRATIONS):
            pass


async def test_file_that_is_no_database(tmp_path: Path) -> None:
    (tmp_path / "registry.db").write_bytes(b"not a database" * 1000)

    with pytest.raises(StartupError, match=r"registry\.db: file is not a database\. Make it"):
        async with opened_database(sqlite_url(tmp_path / "registry.db"), MIGRATIONS):
            pass


async def test_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="unable to open database file"):
        async with opened_database(sqlite_url(tmp_path / "absent" / "registry.db"), MIGRATIONS):
            pass
