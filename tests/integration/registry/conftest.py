"""A fresh registry for each test."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest_asyncio
from tests.integration.registry.registries import Registry, served


@pytest_asyncio.fixture
async def registry(tmp_path: Path) -> AsyncIterator[Registry]:
    async with served(tmp_path) as running:
        yield running
