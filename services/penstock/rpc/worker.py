"""A server in a process that a supervisor (`penstock.rpc.supervise`) started: how the two talk.

Lines of JSON on a socket that the process was started with. The supervisor's first line is the assignment; it then says
`announce` once the port takes calls, and `drain`. The worker says `started`, `serving`, `stopped`, or `failed` and why.
If the supervisor is gone, however it went, the worker drains and ends.
"""

import asyncio
import importlib
import json
import os
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog

from penstock.rpc.application import Application
from penstock.rpc.config import ServerSettings
from penstock.rpc.errors import StartupError
from penstock.rpc.logs import configure_logging

CONTROL_FD = "PENSTOCK_CONTROL_FD"

_log = structlog.get_logger("penstock.server")


@dataclass(frozen=True)
class Assignment:
    """What this process is to serve."""

    settings: ServerSettings
    application: Callable[[Any], AbstractAsyncContextManager[Application]]
    folder: str


class Control:
    """The worker's end of the socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.orphaned = False

    @classmethod
    async def opened(cls) -> "Control":
        descriptor = int(os.environ.pop(CONTROL_FD))
        os.set_inheritable(descriptor, False)
        return cls(*await asyncio.open_connection(sock=socket.socket(fileno=descriptor), limit=2**24))

    async def assignment(self) -> Assignment:
        """What to serve, with logging set up as it says."""
        told = json.loads(await self._reader.readline())
        kind: type[ServerSettings] = _imported(told["settings"])
        # Checked by the process that started us; what is of no consequence here it keeps to itself.
        settings = kind(**told["values"])
        if told["worker"] is not None:
            settings = settings.of_worker(told["worker"], Path(told["folder"]))
        configure_logging(settings.log_format, settings.log_level, settings.section)
        return Assignment(settings, _imported(told["application"]), told["folder"])

    async def told(self) -> str:
        """The next thing to do; `drain` if nobody is there to say anything."""
        line = await self._reader.readline()
        if line:
            return str(json.loads(line)["do"])
        self.orphaned = True
        return "drain"

    def say(self, event: str, error: str = "") -> None:
        self._writer.write(json.dumps({"event": event, "error": error}).encode() + b"\n")

    def say_failed(self, error: BaseException) -> None:
        if not isinstance(error, StartupError):
            _log.error("unexpected error", exc_info=error)
            error = StartupError(f"The service could not start: {type(error).__name__}: {error}.")
        self.say("failed", str(error))

    async def closed(self) -> None:
        """Everything said has left."""
        self._writer.close()
        await asyncio.wait([asyncio.ensure_future(self._writer.wait_closed())], timeout=1)


def _imported(name: str) -> Any:  # noqa: ANN401  # whatever has that name
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)
