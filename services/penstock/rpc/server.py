"""Serves servicers on grpc.aio: health, reflection, a bounded drain, and start-up errors that say what to do."""

import asyncio
import contextlib
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass

import grpc
import structlog
from google.protobuf import descriptor_pool
from google.protobuf.descriptor import FileDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection, reflection_pb2

from penstock.rpc.config import ServerSettings
from penstock.rpc.errors import StartupError
from penstock.rpc.health import HealthServicer
from penstock.rpc.interceptor import CallInterceptor
from penstock.rpc.logs import configure_logging

_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name

# Addresses that one can listen on but not call.
_CALLABLE_HOSTS = {"0.0.0.0": "127.0.0.1", "[::]": "[::1]"}  # noqa: S104  # nothing is bound here

_log = structlog.get_logger("penstock.server")


@dataclass(frozen=True)
class Service:
    """A servicer as the server needs it: the file that declares it, and what adds it to a server."""

    file: FileDescriptor
    add: Callable[[grpc.aio.Server], None]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(service.full_name for service in self.file.services_by_name.values())


@dataclass(frozen=True)
class Application:
    """What a server serves.

    `drain` ends its long-lived streams before it stops: they would outlast any limit. `started` is told where this
    machine can call the server, once it can.
    """

    services: Sequence[Service]
    drain: Callable[[], Awaitable[None]]
    started: Callable[[str], None] = lambda _: None


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
async def listening(settings: ServerSettings, application: Application) -> AsyncIterator[str]:
    """Takes calls on the address it yields, `host:port`. On exit, calls in progress have `drain_s` to finish."""
    interceptor = CallInterceptor(settings.unary_timeout_s, settings.max_message_bytes)
    server = grpc.aio.server(
        interceptors=[interceptor],
        maximum_concurrent_rpcs=settings.max_concurrent_calls,
        options=[
            # Without this, two servers share one port in silence and each gets half of the calls.
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            ("grpc.max_metadata_size", 16 * 1024),
        ],
    )
    health = HealthServicer(name for service in application.services for name in service.names)
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    for service in application.services:
        service.add(server)
    if settings.reflection:
        _add_reflection(server, application.services)
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    try:
        port = server.add_insecure_port(f"{host}:{settings.port}")
    except RuntimeError as error:
        raise StartupError(
            f"Cannot listen on {host}:{settings.port}: the address is not this machine's, or something "
            f"listens there already. Stop that, or choose another port with --port (0 takes a free one)."
        ) from error
    await server.start()
    try:
        application.started(f"{_CALLABLE_HOSTS.get(host, host)}:{port}")
        yield f"{host}:{port}"
    finally:
        health.drain()
        # New calls are refused before the streams end: their clients come back at once.
        interceptor.drain()
        cut_off = asyncio.get_running_loop().time() + settings.drain_s
        try:
            await application.drain()
            await interceptor.finished(settings.drain_s)
        finally:
            await server.stop(max(0.0, cut_off - asyncio.get_running_loop().time()))


def _add_reflection(server: grpc.aio.Server, services: Sequence[Service]) -> None:
    """Reflection over one pool of all files: the protocol of inference lives in a pool of its own."""
    pool = descriptor_pool.DescriptorPool()
    seen: set[str] = set()
    for file in (*(service.file for service in services), health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR):
        _copy_file(file, pool, seen)
    names = [name for service in services for name in service.names]
    reflection.enable_server_reflection((*names, _HEALTH, reflection.SERVICE_NAME), server, pool)


def _copy_file(file: FileDescriptor, pool: descriptor_pool.DescriptorPool, seen: set[str]) -> None:
    if file.name in seen:
        return
    seen.add(file.name)
    for dependency in file.dependencies:
        _copy_file(dependency, pool, seen)
    pool.AddSerializedFile(file.serialized_pb)


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
