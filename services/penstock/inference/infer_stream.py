"""One ModelStreamInfer call: many requests at once, answers in the order of the requests.

Models that are decoupled answer when and as often as they like; their answers keep no order with others.
"""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing

from penstock.inference.wire import InferRequest
from penstock.rpc.methods import Encoded

# Requests of one stream that are worked on at once, and answers that wait for the client to read. Who sends more, or
# reads no faster, is waited for: memory stays bounded.
_MAX_IN_FLIGHT = 256
_MAX_UNREAD = 16

Answers = Callable[[InferRequest], AsyncGenerator[Encoded]]


class InferStream:
    """`answers` gives the answers to one request and raises nothing; `in_order` says whether they keep their place.

    Above `max_bytes` in requests that are worked on and answers that are unread, no further request is begun.
    """

    def __init__(self, answers: Answers, in_order: Callable[[InferRequest], bool], max_bytes: int) -> None:
        self._answers = answers
        self._in_order = in_order
        self._max_bytes = max_bytes
        self._bytes = 0
        self._working = 0
        # Of all answers so far: those that are still to come are taken to be as large.
        self._largest_answer = 0
        self._fewer_bytes = asyncio.Event()
        # None: there will be no more. That finds a place whoever reads, so the answers' places are counted apart.
        self._unread: asyncio.Queue[Encoded | None] = asyncio.Queue()
        self._places = asyncio.Semaphore(_MAX_UNREAD)
        self._free = asyncio.Semaphore(_MAX_IN_FLIGHT)
        # Done when the request that came last has been answered.
        self._turn: asyncio.Future[None] | None = None
        self._failure: Exception | None = None

    async def responses(self, requests: AsyncIterator[InferRequest]) -> AsyncGenerator[Encoded]:
        """The answers to all requests. When the client has sent its last one, those in flight are finished.

        When it is closed, nothing of the stream is worked on any more.
        """
        working = asyncio.create_task(self._work(requests))
        try:
            while (answer := await self._unread.get()) is not None:
                self._places.release()
                yield answer
                self._let_go(answer.size)
            if self._failure is not None:
                raise self._failure
        finally:
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)

    async def _work(self, requests: AsyncIterator[InferRequest]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                try:
                    await self._begin_all(requests, group)
                except Exception as error:
                    # Bytes that are no request end the stream, once those before them have been answered.
                    self._failure = error
        finally:
            self._unread.put_nowait(None)

    async def _begin_all(self, requests: AsyncIterator[InferRequest], group: asyncio.TaskGroup) -> None:
        async for request in requests:
            await self._free.acquire()
            held = await self._room(request.size)
            before, done = self._turn, asyncio.get_running_loop().create_future()
            if self._in_order(request):
                self._turn = done
            else:
                before = None
            group.create_task(self._answer(request, held, before, done))

    async def _answer(
        self, request: InferRequest, held: int, before: "asyncio.Future[None] | None", done: "asyncio.Future[None]"
    ) -> None:
        try:
            async with aclosing(self._answers(request)) as answers:
                async for answer in answers:
                    self._bytes += answer.size
                    if answer.size > self._largest_answer:
                        self._largest_answer = answer.size
                        self._fewer_bytes.set()
                    if before is not None and not before.done():
                        await before
                    await self._places.acquire()
                    self._unread.put_nowait(answer)
        finally:
            self._free.release()
            self._working -= 1
            self._let_go(held)
            if not done.done():
                done.set_result(None)

    async def _room(self, size: int) -> int:
        """The bytes that are held for a request and its answer, once there is room; one may be of any size.

        While nobody knows how large answers are, few requests are begun.
        """
        while self._bytes and (
            self._bytes + size + self._largest_answer > self._max_bytes
            or (not self._largest_answer and self._working >= _MAX_UNREAD)
        ):
            self._fewer_bytes.clear()
            await self._fewer_bytes.wait()
        held = size + self._largest_answer
        self._bytes += held
        self._working += 1
        return held

    def _let_go(self, size: int) -> None:
        self._bytes -= size
        self._fewer_bytes.set()
