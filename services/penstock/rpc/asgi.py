"""gRPC as an ASGI application: the methods of our servicers for a server that speaks HTTP/2 and sends trailers.

Such a server is pyvoy. The one path that must be fast, one request and one answer, is written out; what it leaves
aside, clients who left and the server's own time limit, one watcher looks after for all calls that last.
"""

import asyncio
import contextlib
import heapq
import itertools
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import grpc
from structlog.contextvars import bind_contextvars

from penstock.rpc import calls, frames
from penstock.rpc.asgi_call import START, AsgiCall, ClientLeftError, Pairs, Receive, Scope, Send
from penstock.rpc.errors import NotReadyError
from penstock.rpc.methods import Encoded, Method

_TICK_S = 0.05
# How long a client's leaving may stay unseen: more the more calls there are, so that looking never becomes the work.
_LONGEST_S = 1.0
_LOOKS_A_SECOND = 2000

_SMALL_BYTES = 64 * 1024
_REQUEST_ID = calls.REQUEST_ID_KEY.encode()


class GrpcApplication:
    """The ASGI application over a server's methods. `watching` must run while it takes calls."""

    def __init__(
        self, methods: Mapping[str, Method], active: calls.Calls, unary_timeout_s: float, *, compress: bool = False
    ) -> None:
        self._methods = methods
        self._calls = active
        self._unary_timeout_s = unary_timeout_s
        self._compress = compress
        # In the order in which they began; those that last move on to the watcher's heap.
        self._young: dict[AsgiCall, None] = {}
        self._watched: list[tuple[float, int, AsgiCall]] = []
        self._numbers = itertools.count()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers one HTTP request. Never raises: the client would wait for ever."""
        headers = dict(scope["headers"])
        method = self._methods.get(scope["path"])
        content_type = headers.get(b"content-type", b"")
        if content_type != b"application/grpc" and not content_type.startswith(
            (b"application/grpc+", b"application/grpc;")
        ):
            await _answer_http(send, 415, b"This is a gRPC server: send application/grpc.\n")
            return
        if scope["method"] != "POST":
            await _answer_http(send, 405, b"gRPC calls are POST requests.\n")
            return
        if method is None:
            await _answer_unknown(send, scope["path"])
            return
        call = AsgiCall(method, scope, receive, send)
        call.task = asyncio.current_task()
        self._young[call] = None
        timer = None
        entered = False
        try:
            if not method.request_streaming:
                call.ask()
            timer = self._prepare(call, headers)
            self._calls.enter(method)
            entered = True
            if method.response_streaming:
                await self._stream(call)
            elif method.request_streaming:
                await self._succeed(call, await method.function(call.requests(), call))
            else:
                request = method.read(await call.whole_request())
                await self._succeed(call, await method.function(request, call))
        except BaseException as error:  # none may leave
            await self._fail(call, error)
        finally:
            call.settled = True
            self._young.pop(call, None)
            if entered:
                self._calls.leave(method)
            if timer is not None:
                timer.cancel()

    def _prepare(self, call: AsgiCall, headers: Mapping[bytes, bytes]) -> asyncio.TimerHandle | None:
        """Takes in what the headers ask for."""
        sent_id = headers.get(_REQUEST_ID)
        if sent_id is not None:
            call.sent_id = calls.fitting_request_id(sent_id.decode("latin-1"))
        bind_contextvars(request_id=call.request_id(self._calls))
        encoding = headers.get(b"grpc-encoding")
        if encoding is not None:
            call.encoding = encoding
            frames.check_encoding(encoding)
        if self._compress and b"gzip" in headers.get(b"grpc-accept-encoding", b""):
            call.compress_answers()
        timeout = headers.get(b"grpc-timeout")
        if timeout is None:
            return None
        limit_s = frames.timeout_s(timeout)
        call.deadline = call.started + limit_s
        return asyncio.get_running_loop().call_later(limit_s, call.interrupt, "late")

    async def _succeed(self, call: AsgiCall, response: Any) -> None:  # noqa: ANN401  # any message
        """Sends the only answer of a call."""
        if call.reason is not None:
            raise asyncio.CancelledError  # the handler went on when it was cancelled
        data = call.method.write(response)
        if type(data) is Encoded and data.size < _SMALL_BYTES:
            data = data.joined()
        call.settled = True
        if call.method.quiet and call.plain_answers and type(data) is bytes and len(data) < _SMALL_BYTES:
            await call.answer_plainly(data)
            code = grpc.StatusCode.OK
        else:
            await call.write(data, last=True)
            code = await self._end(call)
        self._log(call, code.name)

    async def _stream(self, call: AsgiCall) -> None:
        method = call.method
        request = call.requests() if method.request_streaming else method.read(await call.whole_request())
        async with contextlib.aclosing(method.function(request, call)) as responses:
            async for response in responses:
                await call.write(method.write(response))
        if call.reason is not None:
            raise asyncio.CancelledError
        call.settled = True
        self._log(call, (await self._end(call)).name)

    async def _end(self, call: AsgiCall) -> grpc.StatusCode:
        code = call.code_set or grpc.StatusCode.OK
        own: Pairs = ((calls.REQUEST_ID_KEY, call.request_id(self._calls)),)
        await call.finish(code, call.details(), (*own, *call.trailing_metadata()))
        return code

    async def _fail(self, call: AsgiCall, error: BaseException) -> None:
        """Answers with the error's status; where nobody is left to answer, it is only logged."""
        call.unask()
        if isinstance(error, asyncio.CancelledError) and call.task is not None:
            call.task.uncancel()
            if call.reason == "late":
                error = calls.late()
            elif call.reason != "left":
                error = NotReadyError("The server is shutting down. Call another one, or this one again later.")
        call.settled = True
        if isinstance(error, ClientLeftError) or call.reason == "left":
            self._log(call, grpc.StatusCode.CANCELLED.name)
            return
        code, text, trailers = call.ending(error, self._calls)
        with contextlib.suppress(ClientLeftError, asyncio.CancelledError):
            try:
                await call.finish(code, text, trailers)
            except ValueError:
                call.drop_metadata()
                await call.finish(code, text, ())
        self._log(call, code.name, **({"message": text} if text else {}))

    def _log(self, call: AsgiCall, status: str, **fields: str) -> None:
        if status != "OK" or calls.logs_successes(call.method):
            calls.log_call(call.method, status, call.started, call.peer(), **fields)

    def cut_off(self) -> None:
        """Ends every call that is still in progress, with UNAVAILABLE."""
        for call in [*self._young, *(call for _, _, call in self._watched)]:
            call.interrupt("cut off")

    @asynccontextmanager
    async def watching(self) -> AsyncIterator[None]:
        """Looks after the calls that last, as long as the block runs."""
        task = asyncio.create_task(self._watch())
        try:
            yield
        finally:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now = time.monotonic()
            for call in self._older_than(now - _TICK_S):
                del self._young[call]
                heapq.heappush(self._watched, (now, next(self._numbers), call))
            due = []
            while self._watched and self._watched[0][0] <= now:
                call = heapq.heappop(self._watched)[2]
                if not call.settled:
                    due.append(call)
                    heapq.heappush(self._watched, (self._next_look(call, now), next(self._numbers), call))
            await asyncio.gather(*(self._look(call, now) for call in due))

    def _older_than(self, began: float) -> list[AsgiCall]:
        return list(itertools.takewhile(lambda call: call.started < began, self._young))

    def _next_look(self, call: AsgiCall, now: float) -> float:
        age_s = now - call.started
        longest_s = max(_LONGEST_S, len(self._watched) / _LOOKS_A_SECOND)
        wait_s = min(max(_TICK_S, age_s / 4), longest_s)
        if _bounded(call.method):
            wait_s = min(wait_s, max(_TICK_S, self._unary_timeout_s - age_s))
        return now + wait_s

    async def _look(self, call: AsgiCall, now: float) -> None:
        if _bounded(call.method) and now - call.started > self._unary_timeout_s:
            call.interrupt("late")
            return
        with contextlib.suppress(Exception):  # whatever a dying connection raises, its own call finds out
            await call.look()


def _bounded(method: Method) -> bool:
    return not (method.request_streaming or method.response_streaming)


async def _answer_http(send: Send, status: int, text: bytes) -> None:
    """Tells somebody who does not speak gRPC so."""
    headers = [(b"content-type", b"text/plain"), (b"content-length", str(len(text)).encode())]
    with contextlib.suppress(Exception):  # who asked may be gone
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": text, "more_body": False})


async def _answer_unknown(send: Send, path: str) -> None:
    text = frames.percent_encoded(f"This server does not offer {path[:200]}.")
    status = (b"grpc-status", str(grpc.StatusCode.UNIMPLEMENTED.value[0]).encode())
    headers = [*START["headers"], status, (b"grpc-message", text)]  # type: ignore[misc]  # a list, by its definition
    with contextlib.suppress(Exception):
        await send({**START, "headers": headers, "trailers": False})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
