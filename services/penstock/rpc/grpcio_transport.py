"""grpc.aio: the transport that runs on any platform, in the process that asks for it."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import grpc
from structlog.contextvars import bind_contextvars, unbind_contextvars

from penstock.rpc import calls
from penstock.rpc.config import ServerSettings
from penstock.rpc.errors import StartupError
from penstock.rpc.methods import Encoded, Handler, Method

# What a stream may send before its call reads. Half of it costs 12 % of the rate of 16 MB tensors; more brings nothing.
_STREAM_WINDOW = 4 * 2**20

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:  # generic in its type stubs only
    Context = grpc.aio.ServicerContext


@asynccontextmanager
async def grpcio_server(
    settings: ServerSettings, methods: Mapping[str, Method], active: calls.Calls, *, share_port: bool
) -> AsyncIterator[tuple[int, Callable[[float], Awaitable[None]]]]:
    """A listening server: its port, and what stops it within so many seconds, for which it must be called."""
    server = _server(
        settings,
        methods,
        active,
        # Unless it is wanted, two servers share one port in silence and each gets half of the calls.
        ("grpc.so_reuseport", int(share_port)),
        # A level, unlike an algorithm, leaves answers plain for clients that do not take gzip.
        ("grpc.default_compression_level", int(settings.response_compression == "gzip")),
    )
    address = f"{settings.bracketed_host}:{settings.port}"
    credentials = _credentials(settings)
    try:
        port = server.add_secure_port(address, credentials) if credentials else server.add_insecure_port(address)
    except RuntimeError as error:
        raise settings.cannot_listen() from error
    await server.start()
    yield port, server.stop


@asynccontextmanager
async def worker_server(settings: ServerSettings, number: int, methods: Mapping[str, Method]) -> AsyncIterator[None]:
    """Takes the other workers' calls on this worker's socket, also while it drains: what they have begun, they finish.

    Raises `StartupError` if the socket cannot be had.
    """
    server = _server(settings, methods, calls.Calls(settings.max_concurrent_calls))
    address = settings.worker_address(number)
    try:
        server.add_insecure_port(address)
    except RuntimeError as error:
        raise StartupError(
            f"Cannot listen on {address}, where the workers reach each other. If its path is longer than 107 bytes, "
            f"set TMPDIR to a shorter folder; else look whether the folder can be written."
        ) from error
    await server.start()
    try:
        yield
    finally:
        # Calls that are left come from workers that have not drained yet.
        await server.stop(settings.drain_s)


def _server(
    settings: ServerSettings, methods: Mapping[str, Method], active: calls.Calls, *options: tuple[str, object]
) -> grpc.aio.Server:
    server = grpc.aio.server(
        maximum_concurrent_rpcs=settings.max_concurrent_calls,
        options=[
            ("grpc.max_receive_message_length", settings.max_message_bytes),
            ("grpc.max_send_message_length", settings.max_message_bytes),
            ("grpc.max_metadata_size", 16 * 1024),
            # gRPC's own estimate doubles the window as often as it believes the line to be fast: without a bound.
            ("grpc.http2.bdp_probe", 0),
            ("grpc.http2.lookahead_bytes", _STREAM_WINDOW),
            *options,
        ],
    )
    _add(server, methods, active, settings.unary_timeout_s)
    return server


def _credentials(settings: ServerSettings) -> grpc.ServerCredentials | None:
    if settings.tls_cert is None or settings.tls_key is None:
        return None
    authority = settings.tls_client_ca.read_bytes() if settings.tls_client_ca else None
    pair = (settings.tls_key.read_bytes(), settings.tls_cert.read_bytes())
    try:
        return grpc.ssl_server_credentials([pair], authority, require_client_auth=authority is not None)
    except ValueError as error:
        raise StartupError(f"Cannot use {settings.tls_cert} and {settings.tls_key} for TLS: {error}.") from error


def _add(server: grpc.aio.Server, methods: Mapping[str, Method], active: calls.Calls, unary_timeout_s: float) -> None:
    services: dict[str, dict[str, Handler]] = {}
    for path, method in methods.items():
        _, service, name = path.split("/")
        services.setdefault(service, {})[name] = _handler(_Runner(method, active, unary_timeout_s))
    for service, handlers in services.items():
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, handlers),))
        server.add_registered_method_handlers(service, handlers)


def _handler(runner: "_Runner") -> Handler:
    makers: dict[tuple[bool, bool], Callable[..., Handler]] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    method = runner.method
    make = makers[method.request_streaming, method.response_streaming]
    # A single message that grpc itself read would fail before we could answer, an answer that it wrote after.
    run = runner.stream if method.response_streaming else runner.unary
    return make(run, method.read if method.request_streaming else None, None)


class _Runner:
    """Runs one method's calls. A single request comes in bytes, every answer leaves in bytes.

    `unary_timeout_s` bounds calls of one request and one answer whose caller set no earlier deadline. A stream may take
    as long as its caller allows.
    """

    def __init__(self, method: Method, active: calls.Calls, unary_timeout_s: float) -> None:
        self.method = method
        self._calls = active
        self._unary_timeout_s = unary_timeout_s

    async def unary(self, request: Any, context: Context) -> bytes:  # noqa: ANN401  # any message
        call = _Call(self.method, self._calls, context)
        timeout = asyncio.timeout(self._limit_s(context))
        try:
            with self._calls.admitted(self.method):
                async with timeout:
                    response = self._written(await self.method.function(self._read(request), context))
                if timeout.expired():
                    raise TimeoutError  # noqa: TRY301  # the handler went on when it was cancelled
        except TimeoutError as error:
            await call.fail(calls.late() if timeout.expired() else error)
            raise
        except BaseException as error:
            await call.fail(error)
            raise
        else:
            call.succeed()
            return response

    async def stream(self, request: Any, context: Context) -> None:  # noqa: ANN401  # any message
        """Writes the responses itself: where a write fails, grpc would leave a generator as it is."""
        call = _Call(self.method, self._calls, context)
        try:
            with self._calls.admitted(self.method):
                async with contextlib.aclosing(self.method.function(self._read(request), context)) as responses:
                    async for response in responses:
                        await _write(context, self._written(response))
        except BaseException as error:
            await call.fail(error)
            raise
        else:
            call.succeed()

    def _read(self, request: Any) -> Any:  # noqa: ANN401  # any message, or a stream of them
        return request if self.method.request_streaming else self.method.read(request)

    def _written(self, response: Any) -> bytes:  # noqa: ANN401  # any message
        data = self.method.write(response)
        return data.joined() if isinstance(data, Encoded) else data

    def _limit_s(self, context: Context) -> float | None:
        remaining_s = context.time_remaining()
        if self.method.request_streaming:
            return remaining_s
        return self._unary_timeout_s if remaining_s is None else min(remaining_s, self._unary_timeout_s)


async def _write(context: Context, data: bytes) -> None:
    try:
        await context.write(data)
    except grpc.aio.InternalError as error:
        # Nobody is there to read it; that the client left is told later, if at all.
        raise asyncio.CancelledError from error


class _Call:
    """One call in progress: binds its id to the log and settles how it ended."""

    def __init__(self, method: Method, active: calls.Calls, context: Context) -> None:
        self._method = method
        self._context = context
        self._request_id = _request_id(context) or active.next_id()
        # Now: asked for after the call is gone, as it is when a left stream is closed, grpc reads freed memory.
        self._peer = context.peer()
        self._started = time.monotonic()
        bind_contextvars(request_id=self._request_id)
        context.set_trailing_metadata(((calls.REQUEST_ID_KEY, self._request_id),))

    def succeed(self) -> None:
        code = self._context.code()
        self._settle(code.name if isinstance(code, grpc.StatusCode) else "OK")

    async def fail(self, error: BaseException) -> None:
        """Answers with the error's status. A cancelled call has nobody to answer; it is only logged."""
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._settle("CANCELLED")
            return
        if isinstance(error, grpc.aio.AbortError):
            self._settle(self._context.code().name)
            return
        code, text, trailers = calls.answer_to(error, self._method, self._request_id, self._set_code())
        self._settle(code.name, message=text)
        await self._context.abort(code, text, trailers)

    def _set_code(self) -> grpc.StatusCode | None:
        code = self._context.code()
        return code if isinstance(code, grpc.StatusCode) else None

    def _settle(self, status: str, **fields: str) -> None:
        if status != "OK" or calls.logs_successes(self._method):
            calls.log_call(self._method, status, self._started, self._peer, **fields)
        unbind_contextvars("request_id")


def _request_id(context: Context) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == calls.REQUEST_ID_KEY:
            return calls.fitting_request_id(value)
    return None
