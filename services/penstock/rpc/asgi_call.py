"""One call over ASGI: what its handler sees as context, and what goes back to the client."""

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NoReturn, TypeVar

import grpc

from penstock.rpc import calls, frames
from penstock.rpc.errors import InvalidFieldError
from penstock.rpc.methods import Buffer, Encoded, Method

_T = TypeVar("_T")

Event = Mapping[str, Any]
Scope = Mapping[str, Any]
Receive = Callable[[], Awaitable[Event]]
Send = Callable[[dict[str, Any]], Awaitable[None]]
Pairs = tuple[tuple[str, str | bytes], ...]

CONTENT_TYPE = (b"content-type", b"application/grpc")
START = {"type": "http.response.start", "status": 200, "headers": [CONTENT_TYPE], "trailers": True}
TRAILERS = {"type": "http.response.trailers", "headers": [(b"grpc-status", b"0")], "more_trailers": False}

# Parts of at least this size are sent as they are rather than copied behind the others.
_LARGE_BYTES = 64 * 1024
# How much of a request is taken in beforehand while its handler does something else, so that a client who left shows.
_AHEAD_BYTES = 64 * 1024


class ClientLeftError(Exception):
    """Nobody is there to read the answer."""


class AsgiCall:
    """A call in progress. Handlers see it as their context; it offers of grpc.aio's what they use."""

    __slots__ = (
        "_ahead", "_ahead_bytes", "_asked", "_details", "_gzip", "_initial", "_metadata", "_reading",
        "_receive", "_receiving", "_request_id", "_send", "_trailing", "body_closed", "body_ended",
        "code_set", "deadline", "encoding", "method", "reason", "scope", "sent_id", "settled", "started",
        "task", "write_begun",
    )  # fmt: skip

    def __init__(self, method: Method, scope: Scope, receive: Receive, send: Send) -> None:
        self.method = method
        self.scope = scope
        self.started = time.monotonic()
        self.task: asyncio.Task[Any] | None = None
        self.reason: str | None = None
        self.settled = False
        self.write_begun = False
        self.body_ended = False
        self.body_closed = False
        self.deadline: float | None = None
        self.encoding = b""
        self.code_set: grpc.StatusCode | None = None
        self.sent_id: str | None = None
        self._request_id = ""
        self._details = ""
        self._gzip = False
        self._receive = receive
        self._asked: Awaitable[Event] | None = None
        self._send = send
        self._initial: Pairs = ()
        self._trailing: Pairs = ()
        self._metadata: Pairs | None = None
        self._ahead: deque[Event] | None = None
        self._ahead_bytes = 0
        self._reading = False
        self._receiving: asyncio.Future[Event] | None = None

    # The context of a handler.

    def invocation_metadata(self) -> Pairs:
        if self._metadata is None:
            self._metadata = frames.metadata(self.scope["headers"])
        return self._metadata

    def peer(self) -> str:
        host, port = (self.scope.get("client") or ("unknown", 0))[:2]
        return f"ipv6:[{host}]:{port}" if ":" in host else f"ipv4:{host}:{port}"

    def time_remaining(self) -> float | None:
        return None if self.deadline is None else max(0.0, self.deadline - time.monotonic())

    def set_trailing_metadata(self, trailing_metadata: Pairs) -> None:
        self._trailing = tuple(trailing_metadata)

    def trailing_metadata(self) -> Pairs:
        return self._trailing

    async def send_initial_metadata(self, initial_metadata: Pairs) -> None:
        """Sent with the first message: an HTTP answer's headers leave with its first byte."""
        if self.write_begun:
            raise grpc.aio.UsageError("the initial metadata has been sent already")
        self._initial = tuple(initial_metadata)

    def set_code(self, code: grpc.StatusCode) -> None:
        self.code_set = code

    def code(self) -> grpc.StatusCode | None:
        return self.code_set

    def set_details(self, details: str) -> None:
        self._details = details

    def details(self) -> str:
        return self._details

    def cancelled(self) -> bool:
        return self.reason is not None

    def done(self) -> bool:
        return self.settled

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Pairs = ()) -> NoReturn:
        self.code_set, self._details = code, details
        if trailing_metadata:
            self._trailing = tuple(trailing_metadata)
        raise grpc.aio.AbortError

    # What may end it from outside.

    def interrupt(self, reason: str) -> None:
        """Cancels the handler, as grpc.aio does: its caller left, its deadline passed, or the server stops."""
        if not self.settled and self.reason is None and self.task is not None:
            self.reason = reason
            self.task.cancel()

    async def look(self) -> None:
        """Finds out whether the client is still there. Where somebody reads the request, they do."""
        if self.settled or self._reading or self._receiving is not None:
            return
        if self.body_ended:
            event = await self._receive()
            if event["type"] == "http.disconnect":
                self.interrupt("left")
        elif self._ahead_bytes < _AHEAD_BYTES:
            self._receiving = asyncio.ensure_future(self._receive())
            self._receiving.add_done_callback(self._arrived)
        else:
            await self._knock()

    async def _knock(self) -> None:
        """Sends nothing, which fails where nobody is left. The request holds too much unread to ask for more of it."""
        try:
            await self._begin()
            if not self.body_closed:
                await self.send({"type": "http.response.body", "body": b"", "more_body": True})
        except ClientLeftError:
            self.reason = None
            self.interrupt("left")

    def _arrived(self, receiving: asyncio.Future[Event]) -> None:
        self._receiving = None
        if receiving.cancelled():
            return
        if receiving.exception() is not None:
            self.interrupt("left")
            return
        event = receiving.result()
        if event["type"] == "http.disconnect":
            self.interrupt("left")
        self._ahead = self._ahead or deque()
        self._ahead.append(event)
        self._ahead_bytes += len(event.get("body", b""))
        self.body_ended = self.body_ended or not event.get("more_body", False)

    # Requests.

    def ask(self) -> None:
        """Has the first bytes of the request fetched, from another thread, while the call is prepared."""
        self._reading = True
        self._asked = self._receive()

    def unask(self) -> None:
        """Has nobody wait for what was asked for: the call ends before it is looked at."""
        asked, self._asked = self._asked, None
        if asked is not None:
            asyncio.ensure_future(asked).add_done_callback(_retrieve)

    async def _chunk(self) -> bytes:
        """The next bytes of the request; none once it has ended."""
        while not self._ahead and self._receiving is not None:
            await asyncio.wait([self._receiving])
        if self._ahead:
            event = self._ahead.popleft()
            self._ahead_bytes -= len(event.get("body", b""))
        elif self.body_ended:
            return b""
        else:
            self._reading = True
            asked, self._asked = self._asked, None
            try:
                # To shield it costs 8 % of what small calls there can be; what was asked for is seldom cancelled.
                event = await (_uncancelled(self._receive()) if asked is None else asked)
            finally:
                self._reading = False
            self.body_ended = not event.get("more_body", False)
        if event["type"] == "http.disconnect":
            # The handler is to hear of it as it would anywhere else: cancelled where it waits.
            self.interrupt("left")
            await asyncio.sleep(0)
            raise ClientLeftError
        body: bytes = event.get("body", b"")
        return body

    async def whole_request(self) -> Buffer:
        """The bytes of the only message of the request. What a client sends behind it is not looked at."""
        first = await self._chunk()
        if len(first) >= frames.PREFIX_BYTES:
            size = frames.message_size(first, self.method.max_message_bytes)
            if len(first) == frames.PREFIX_BYTES + size and not first[0]:
                return first[5:] if size < _LARGE_BYTES else memoryview(first)[5:]
        async with contextlib.aclosing(self._messages(first)) as messages:
            async for message in messages:
                return message
        raise InvalidFieldError.of("request", "the call brought no message; this method takes one")

    async def requests(self) -> AsyncIterator[Any]:
        """The messages of a streamed request, as the handler takes them."""
        async for message in self._messages(b""):
            yield self.method.read(message)

    async def _messages(self, chunk: bytes) -> AsyncGenerator[Buffer]:
        """Cuts the request's bytes into messages. Holds no more than one message and the chunk that ends it."""
        data, at = memoryview(chunk), 0
        while True:
            if len(data) - at < frames.PREFIX_BYTES:
                data, at = await self._filled(data[at:], frames.PREFIX_BYTES), 0
                if not data:
                    return
            body = at + frames.PREFIX_BYTES
            size = frames.message_size(data[at:body], self.method.max_message_bytes)
            if len(data) < body + size:
                data, at, body = await self._filled(data[at:], frames.PREFIX_BYTES + size), 0, frames.PREFIX_BYTES
            yield self._plain(data[body : body + size], bool(data[at]))
            at = body + size

    async def _filled(self, held: memoryview, wanted: int) -> memoryview:
        """At least the wanted number of bytes, the held ones first; none where the request ends with them."""
        chunks: list[Buffer] = [held]
        count = len(held)
        while count < wanted:
            more = await self._chunk()
            if not more and self.body_ended and not self._ahead:
                if not count:
                    break
                await self._check_still_there()
                raise InvalidFieldError.of("request", "it ends in the middle of a message")
            chunks.append(more)
            count += len(more)
        return memoryview(b"".join(chunks))

    async def _check_still_there(self) -> None:
        """A request that its client cut off arrives as a short one."""
        if (await self._receive())["type"] == "http.disconnect":
            raise ClientLeftError

    def _plain(self, message: memoryview, compressed: bool) -> Buffer:
        if not compressed:
            return message
        return frames.inflated(message, self.encoding, self.method.max_message_bytes)

    # Answers.

    def compress_answers(self) -> None:
        self._gzip = True

    @property
    def plain_answers(self) -> bool:
        """Whether nothing was asked for that the precomputed start and trailers leave out."""
        return not (self._gzip or self._initial or self._trailing or self.code_set or self.sent_id)

    async def answer_plainly(self, data: bytes) -> None:
        """The whole of a small answer that went well, with nothing beside it: what `write` and `finish` would send."""
        body = frames.prefix(len(data)) + data
        self.write_begun = self.body_closed = True
        send = self._send
        try:
            await send(START)
            await send({"type": "http.response.body", "body": body, "more_body": False})
            await send(TRAILERS)
        except Exception as error:
            self.reason = self.reason or "left"
            raise ClientLeftError from error

    async def write(self, message: bytes | Encoded, *, last: bool = False) -> None:
        """Sends one message; waits while the client does not read."""
        await self._begin()
        parts = message.parts if isinstance(message, Encoded) else (message,)
        size = message.size if isinstance(message, Encoded) else len(message)
        if self._gzip:
            data = frames.deflated(b"".join(parts))
            parts, size = (data,), len(data)
        small: list[Buffer] = [frames.prefix(size, compressed=self._gzip)]
        for part in parts:
            if len(part) < _LARGE_BYTES:
                small.append(part)
                continue
            await self.send({"type": "http.response.body", "body": b"".join(small), "more_body": True})
            # The transport takes bytes alone.
            await self.send({"type": "http.response.body", "body": bytes(part), "more_body": True})
            small = []
        if small or last:
            self.body_closed = last
            await self.send({"type": "http.response.body", "body": b"".join(small), "more_body": not last})

    async def _begin(self) -> None:
        if self.write_begun:
            return
        start: dict[str, Any] = START
        if self._gzip or self._initial:
            headers = [CONTENT_TYPE, *frames.metadata_headers(self._initial)]
            start = {**START, "headers": [*headers, (b"grpc-encoding", b"gzip")] if self._gzip else headers}
        self.write_begun = True
        await self.send(start)

    async def finish(self, code: grpc.StatusCode, text: str, trailing: Pairs) -> None:
        """Ends the call with a status: behind the messages, or in the headers where there was none.

        Raises `ValueError`, with nothing sent, for metadata that cannot be.
        """
        headers = [(b"grpc-status", str(code.value[0]).encode()), *frames.metadata_headers(trailing)]
        if text:
            headers.append((b"grpc-message", frames.percent_encoded(text)))
        if not self.write_begun:
            accept = (b"grpc-accept-encoding", frames.ACCEPTED)
            headers = [CONTENT_TYPE, accept, *frames.metadata_headers(self._initial), *headers]
            self.write_begun = True
            await self.send({**START, "headers": headers, "trailers": False})
            await self._close_body()
            return
        await self._close_body()
        await self.send({**TRAILERS, "headers": headers})

    async def _close_body(self) -> None:
        if not self.body_closed:
            self.body_closed = True
            await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    def drop_metadata(self) -> None:
        """Forgets what the handler wanted to send: it cannot be."""
        self._initial = self._trailing = ()

    async def send(self, event: dict[str, Any]) -> None:
        """Sends an event. pyvoy takes it when it is called: what a cancelled wait has sent is sent."""
        try:
            await _uncancelled(self._send(event))
        except Exception as error:
            self.reason = self.reason or "left"
            raise ClientLeftError from error

    def request_id(self, active: calls.Calls) -> str:
        if not self._request_id:
            self._request_id = self.sent_id or active.next_id()
        return self._request_id

    def ending(self, error: BaseException, active: calls.Calls) -> tuple[grpc.StatusCode, str, Pairs]:
        """Status, text and trailers for what the handler raised."""
        request_id = self.request_id(active)
        if isinstance(error, grpc.aio.AbortError):
            own = ((calls.REQUEST_ID_KEY, request_id), *self._trailing)
            return self.code_set or grpc.StatusCode.UNKNOWN, self._details, own
        return calls.answer_to(error, self.method, request_id, self.code_set)


async def _uncancelled(event: Awaitable[_T]) -> _T:
    """The event, which stays as it is when its waiter is cancelled: pyvoy settles its futures whether or not."""
    if not asyncio.isfuture(event):
        return await event
    try:
        return await asyncio.shield(event)
    except asyncio.CancelledError:
        event.add_done_callback(_retrieve)
        raise


def _retrieve(future: "asyncio.Future[Any]") -> None:
    """Says that it was seen how a future ended, which nobody waits for any more."""
    if not future.cancelled():
        future.exception()
