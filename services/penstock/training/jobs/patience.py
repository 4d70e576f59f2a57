"""What the service does by itself has no caller to tell that the disk is full: it waits until there is room."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

import structlog

from penstock.rpc.errors import StorageFullError

_PAUSE_S = 2.0

_log = structlog.get_logger("penstock.jobs")

Result = TypeVar("Result")


async def until_stored(change: Callable[[], Awaitable[Result]]) -> Result:
    """Repeats a change until the disk has room for it."""
    while True:
        try:
            return await change()
        except StorageFullError as error:
            _log.error("change waits", error=error.message, retry_in_s=_PAUSE_S)
            await asyncio.sleep(_PAUSE_S)
