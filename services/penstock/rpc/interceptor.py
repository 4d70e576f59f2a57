"""What happens around every call: request id, deadline, errors to status, access log."""

import asyncio
import contextlib
import re
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Any

import grpc
import structlog
from google.protobuf.message import DecodeError
from structlog.contextvars import bind_contextvars, unbind_contextvars

from penstock.rpc.errors import (
    DeadlineError,
    InvalidFieldError,
    LimitExceededError,
    NotReadyError,
    PenstockError,
)
from penstock.rpc.status import DETAILS_KEY, to_status

REQUEST_ID_KEY = "x-request-id"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

# Probes come every few seconds and say nothing.
_QUIET_SERVICES = ("/grpc.health.v1.", "/grpc.reflection.")

_log = structlog.get_logger("penstock.access")

# The messages pass through unread: their types are the contract's, not ours.
if TYPE_CHECKING:
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]
else:  # generic in its type stubs only
    Handler = grpc.RpcMethodHandler
    Context = grpc.aio.ServicerContext


class CallInterceptor(grpc.aio.ServerInterceptor):
    """Runs every handler inside `_Call`.

    `unary_timeout_s` bounds calls of one request and one answer whose caller set no earlier deadline. A stream may take
    as long as its caller allows. An answer above `max_message_bytes` is refused, which a client could not take.
    """

    def __init__(self, unary_timeout_s: float, max_message_bytes: int) -> None:
        self._unary_timeout_s = unary_timeout_s
        self._max_message_bytes = max_message_bytes
        self._draining = False
        self._in_progress = 0
        self._ended = asyncio.Event()

    def drain(self) -> None:
        """Refuses every call that comes from now on, with a status that lets its caller go elsewhere.

        A server that is being stopped answers CANCELLED instead, which clients do not retry.
        """
        self._draining = True

    async def finished(self, limit_s: float) -> None:
        """Returns when no call is in progress any more, or at the limit."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                while self._in_progress:
                    self._ended.clear()
                    await self._ended.wait()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Wraps the handler that was found; an unknown method stays as it is."""
        handler = await continuation(handler_call_details)
        if handler is None:
            return handler
        request_id = _request_id(handler_call_details)
        method = handler_call_details.method
        wrap = self._streaming if handler.response_streaming else self._unary
        return _rebuilt(handler, wrap(handler, method, request_id))

    def _unary(self, handler: Handler, method: str, request_id: str) -> Callable[..., Awaitable[Any]]:
        function = _handler_function(handler)

        async def run(request: Any, context: Context) -> Any:  # noqa: ANN401  # any message
            call = _Call(method, request_id, context)
            timeout = asyncio.timeout(self._limit_s(handler, context))
            try:
                with self._admitted(method):
                    async with timeout:
                        response = self._written(handler, await function(_read(handler, request), context))
            except TimeoutError as error:
                late = DeadlineError("The call took longer than its deadline, or than this server allows.")
                await call.fail(late if timeout.expired() else error)
            except BaseException as error:
                await call.fail(error)
                raise
            else:
                call.succeed()
                return response

        return run

    def _streaming(self, handler: Handler, method: str, request_id: str) -> Callable[..., AsyncIterator[Any]]:
        function = _handler_function(handler)

        async def run(request: Any, context: Context) -> AsyncIterator[Any]:  # noqa: ANN401  # any message
            call = _Call(method, request_id, context)
            try:
                with self._admitted(method):
                    async with contextlib.aclosing(function(_read(handler, request), context)) as responses:
                        async for response in responses:
                            yield self._written(handler, response)
            except BaseException as error:
                await call.fail(error)
                raise
            else:
                call.succeed()

        return run

    @contextlib.contextmanager
    def _admitted(self, method: str) -> Iterator[None]:
        # Health has an answer of its own while draining, and neither it nor reflection is waited for.
        if method.startswith(_QUIET_SERVICES):
            yield
            return
        if self._draining:
            raise NotReadyError("The server is shutting down. Call another one, or this one again later.")
        self._in_progress += 1
        try:
            yield
        finally:
            self._in_progress -= 1
            self._ended.set()

    def _written(self, handler: Handler, response: Any) -> Any:  # noqa: ANN401  # any message
        """The answer in bytes. Above the limit grpc would refuse it too, with a trace in the log and no remedy."""
        data = handler.response_serializer(response) if handler.response_serializer else response
        if len(data) > self._max_message_bytes:
            raise LimitExceededError(
                f"The answer has {len(data):,} bytes; this server sends at most {self._max_message_bytes:,} in a "
                f"message. Ask for less at once, or raise max_message_mib."
            )
        return data

    def _limit_s(self, handler: Handler, context: Context) -> float | None:
        remaining_s = context.time_remaining()
        if handler.request_streaming:
            return remaining_s
        return self._unary_timeout_s if remaining_s is None else min(remaining_s, self._unary_timeout_s)


class _Call:
    """One call in progress: binds its id to the log and settles how it ended."""

    def __init__(self, method: str, request_id: str, context: Context) -> None:
        self._method = method
        self._request_id = request_id
        self._context = context
        # Now: asked for after the call is gone, as it is when a left stream is closed, grpc reads freed memory.
        self._peer = context.peer()
        self._started = time.monotonic()
        bind_contextvars(request_id=request_id)
        context.set_trailing_metadata(((REQUEST_ID_KEY, request_id),))

    def succeed(self) -> None:
        self._settle("OK")

    async def fail(self, error: BaseException) -> None:
        """Answers with the error's status. A cancelled call has nobody to answer; it is only logged."""
        if isinstance(error, asyncio.CancelledError | GeneratorExit):
            self._settle("CANCELLED")
            return
        if isinstance(error, grpc.aio.AbortError):
            self._settle(self._context.code().name)
            return
        code, status = to_status(error, self._request_id)
        if not isinstance(error, PenstockError):
            _log.error("unexpected error", method=self._method, exc_info=error)
        self._settle(code.name, message=status.message)
        trailers = ((REQUEST_ID_KEY, self._request_id), (DETAILS_KEY, status.SerializeToString()))
        await self._context.abort(code, status.message, trailers)

    def _settle(self, status: str, **fields: str) -> None:
        if not self._method.startswith(_QUIET_SERVICES):
            duration_ms = round((time.monotonic() - self._started) * 1000, 2)
            _log.info("call", method=self._method, status=status, duration_ms=duration_ms, peer=self._peer, **fields)
        unbind_contextvars("request_id")


def _request_id(details: grpc.HandlerCallDetails) -> str:
    """The caller's own id where it sent a fitting one, so that its log and ours can be joined."""
    for key, value in details.invocation_metadata or ():
        if key == REQUEST_ID_KEY and isinstance(value, str) and _REQUEST_ID.fullmatch(value):
            return value
    return uuid.uuid4().hex


def _handler_function(handler: Handler) -> Callable[..., Any]:
    functions = (handler.unary_unary, handler.unary_stream, handler.stream_unary, handler.stream_stream)
    return next(function for function in functions if function is not None)


def _decoder(handler: Handler) -> Callable[[bytes], Any]:
    """The handler's own deserializer; bytes that are no message are the caller's fault, not the server's."""

    def decode(data: bytes) -> Any:  # noqa: ANN401  # any message
        try:
            return handler.request_deserializer(data) if handler.request_deserializer else data
        except DecodeError as error:
            raise InvalidFieldError.of("request", "its bytes are not the message that this method takes") from error

    return decode


def _read(handler: Handler, request: Any) -> Any:  # noqa: ANN401  # any message, or a stream of them
    """The request as the handler takes it; `_rebuilt` leaves a single message in bytes."""
    return request if handler.request_streaming else _decoder(handler)(request)


def _rebuilt(handler: Handler, function: Callable[..., Any]) -> Handler:
    makers: dict[tuple[bool, bool], Callable[..., Handler]] = {
        (False, False): grpc.unary_unary_rpc_method_handler,
        (False, True): grpc.unary_stream_rpc_method_handler,
        (True, False): grpc.stream_unary_rpc_method_handler,
        (True, True): grpc.stream_stream_rpc_method_handler,
    }
    make = makers[handler.request_streaming, handler.response_streaming]
    # A single message that grpc itself read would fail before `_Call` could answer, an answer that it wrote after.
    return make(function, _decoder(handler) if handler.request_streaming else None, None)
