"""The ASGI application that Envoy loads: the service's methods, and its life from start to drain."""

import asyncio
import contextlib
import os
import shutil
import signal
import time
from collections.abc import Mapping
from typing import Any

import structlog

from penstock.rpc.application import Application
from penstock.rpc.asgi import GrpcApplication
from penstock.rpc.asgi_call import Receive, Scope, Send
from penstock.rpc.calls import Calls
from penstock.rpc.config import ServerSettings
from penstock.rpc.health import HealthServicer
from penstock.rpc.methods import collect
from penstock.rpc.probes import with_probes
from penstock.rpc.worker import Assignment, Control

# What pyvoy needs to load Python is not meant for the programs that a service starts.
for _name in ("LD_PRELOAD", "PYTHONHOME", "PYTHONPATH"):
    os.environ.pop(_name, None)

_log = structlog.get_logger("penstock.server")


class _Server:
    """The server of this process."""

    def __init__(self) -> None:
        self.answer: GrpcApplication | None = None
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once the application takes calls. If it cannot, the supervisor is told and the process ends."""
        entered = asyncio.Event()
        self._running = asyncio.create_task(self._run(entered))
        await entered.wait()

    async def _run(self, entered: asyncio.Event) -> None:
        control = await Control.opened()
        try:
            assignment = await control.assignment()
            await self._serve(control, assignment, entered)
            _log.info("stopped")
            control.say("stopped")
        except Exception as error:
            control.say_failed(error)
            if not entered.is_set():
                # The supervisor tells why; Envoy would add lines that help nobody.
                await control.closed()
                os._exit(1)
        if control.orphaned:
            shutil.rmtree(assignment.folder, ignore_errors=True)
            os.kill(os.getpid(), signal.SIGTERM)
        # Open until this process ends: the supervisor takes the end of the socket for the end of the process.

    async def _serve(self, control: Control, assignment: Assignment, entered: asyncio.Event) -> None:
        settings = assignment.settings
        async with assignment.application(settings) as running:
            health, services = with_probes(settings, running.services)
            calls = Calls(settings.max_concurrent_calls)
            self.answer = GrpcApplication(
                collect(services, settings.max_message_bytes),
                calls,
                settings.unary_timeout_s,
                compress=settings.response_compression == "gzip",
            )
            async with self.answer.watching():
                entered.set()
                control.say("started")
                if await control.told() == "announce":
                    running.started(f"{settings.callable_host}:{settings.port}")
                    _log.info("ready", address=f"{settings.bracketed_host}:{settings.port}")
                    control.say("serving")
                    await control.told()
                _log.info("draining", limit_s=settings.drain_s)
                await _drain(settings, running, health, calls, self.answer)


async def _drain(
    settings: ServerSettings, running: Application, health: HealthServicer, calls: Calls, answer: GrpcApplication
) -> None:
    health.drain()
    # New calls are refused before the streams end: their clients come back at once.
    calls.drain()
    cut_off = time.monotonic() + settings.drain_s
    try:
        await running.drain()
    finally:
        await calls.finished(max(0.0, cut_off - time.monotonic()))
        answer.cut_off()
        await calls.finished(1)


_server = _Server()


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http" and _server.answer is not None:
        await _server.answer(scope, receive, send)
    elif scope["type"] == "lifespan":
        await _live(receive, send)


async def _live(receive: Receive, send: Send) -> None:
    event: Mapping[str, Any] = await receive()
    await _server.start()
    await send({"type": f"{event['type']}.complete"})
    event = await receive()
    with contextlib.suppress(Exception):
        await send({"type": f"{event['type']}.complete"})
