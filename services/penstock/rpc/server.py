"""Serves an application on grpc.aio, in this process: a bounded drain, and start-up errors that say what to do."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import structlog

from penstock.rpc.application import Application, Service
from penstock.rpc.calls import Calls
from penstock.rpc.config import ServerSettings
from penstock.rpc.errors import StartupError
from penstock.rpc.grpcio_transport import grpcio_server
from penstock.rpc.logs import configure_logging
from penstock.rpc.methods import collect
from penstock.rpc.probes import with_probes

__all__ = ["Application", "Service", "listening", "serve"]

_log = structlog.get_logger("penstock.server")


async def serve(settings: ServerSettings, application: AbstractAsyncContextManager[Application]) -> None:
    """Serves until SIGTERM, SIGINT or, with `stop_on_eof`, the end of standard input; then drains and returns.

    Raises `StartupError` if the port, the home or the ready file cannot be had.
    """
    configure_logging(settings.log_format, settings.log_level, settings.section)
    stop = asyncio.Event()
    _stop_on_signals(stop)
    if settings.stop_on_eof:
        _stop_on_eof(stop)
    async with application as running, listening(settings, running) as address:
        _log.info("ready", address=address)
        with _ready_file(settings, address):
            await stop.wait()
        _log.info("draining", limit_s=settings.drain_s)
    _log.info("stopped")


@asynccontextmanager
async def listening(
    settings: ServerSettings, application: Application, *, share_port: bool = False
) -> AsyncIterator[str]:
    """Takes calls on the address it yields, `host:port`. On exit, calls in progress have `drain_s` to finish."""
    health, services = with_probes(settings, application.services)
    methods = collect(services, settings.max_message_bytes)
    calls = Calls(settings.max_concurrent_calls)
    async with grpcio_server(settings, methods, calls, share_port=share_port) as (port, stop):
        try:
            application.started(f"{settings.callable_host}:{port}")
            yield f"{settings.bracketed_host}:{port}"
        finally:
            health.drain()
            # New calls are refused before the streams end: their clients come back at once.
            calls.drain()
            cut_off = asyncio.get_running_loop().time() + settings.drain_s
            try:
                await application.drain()
                await calls.finished(settings.drain_s)
            finally:
                await stop(max(0.0, cut_off - asyncio.get_running_loop().time()))


def _stop_on_signals(stop: asyncio.Event) -> None:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)


def _stop_on_eof(stop: asyncio.Event) -> None:
    """Standard input may be a pipe, a terminal, a file or nothing at all; only a thread can wait for all of them."""
    loop = asyncio.get_running_loop()

    def wait() -> None:
        # An unreadable standard input has nobody at its other end either.
        with contextlib.suppress(OSError):
            while os.read(0, 4096):
                pass
        # The loop is closed where the server stopped for another reason.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(stop.set)

    threading.Thread(target=wait, name="stop-on-eof", daemon=True).start()


@contextlib.contextmanager
def _ready_file(settings: ServerSettings, address: str) -> Iterator[None]:
    """Announces the address to whoever started the server; it appears whole or not at all."""
    path = settings.ready_file
    if path is None:
        yield
        return
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_text(address, encoding="utf-8")
        partial.replace(path)
    except OSError as error:
        raise StartupError(
            f"Cannot write the ready file {path}: {error.strerror}. Choose another with --ready-file."
        ) from error
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
