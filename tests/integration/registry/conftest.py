"""A fresh registry for each test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio
from tests.integration.registry.registries import Registry, served


@pytest_asyncio.fixture
async def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Registry]:
    """It never polls: what its watchers see, its own changes told them."""
    monkeypatch.setattr("penstock.registry.desired.POLL_S", 3600.0)
    async with served(tmp_path) as running:
        yield running
