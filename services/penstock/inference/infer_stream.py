"""One ModelStreamInfer call: many requests at once, answers in the order of the requests.

Models that are decoupled answer when and as often as they like; their answers keep no order with others.
"""

import asyncio
from collections.abc import AsyncIterator, Callable

from penstock.inference.wire import InferRequest
from penstock.rpc.errors import PenstockError
from penstock.rpc.methods import Encoded

# Requests of one stream that are worked on at once, and answers that wait for the client to read. Who sends more, or
# reads no faster, is waited for: memory stays bounded.
_MAX_IN_FLIGHT = 256
_MAX_UNREAD = 16

Answers = Callable[[InferRequest], AsyncIterator[Encoded]]


class InferStream:
    """`answers` gives the answers to one request and raises nothing; `in_order` says whether they keep their place."""

    def __init__(self, answers: Answers, in_order: Callable[[InferRequest], bool]) -> None:
        self._answers = answers
        self._in_order = in_order
        self._unread: asyncio.Queue[Encoded | None] = asyncio.Queue(_MAX_UNREAD)
        self._free = asyncio.Semaphore(_MAX_IN_FLIGHT)
        # Done when the request that came last has been answered.
        self._turn: asyncio.Future[None] | None = None
        self._unreadable: PenstockError | None = None

    async def responses(self, requests: AsyncIterator[InferRequest]) -> AsyncIterator[Encoded]:
        """The answers to all requests. When the client has sent its last one, those in flight are finished."""
        working = asyncio.create_task(self._work(requests))
        try:
            while (answer := await self._unread.get()) is not None:
                yield answer
            await working
            if self._unreadable is not None:
                raise self._unreadable
        finally:
            working.cancel()

    async def _work(self, requests: AsyncIterator[InferRequest]) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                await self._begin_all(requests, group)
        finally:
            # A stream that was cut off has no reader any more.
            if not self._unread.full():
                self._unread.put_nowait(None)
            else:
                await self._unread.put(None)

    async def _begin_all(self, requests: AsyncIterator[InferRequest], group: asyncio.TaskGroup) -> None:
        try:
            async for request in requests:
                await self._free.acquire()
                before, done = self._turn, asyncio.get_running_loop().create_future()
                if self._in_order(request):
                    self._turn = done
                else:
                    before = None
                group.create_task(self._answer(request, before, done))
        except PenstockError as error:
            # Bytes that are no request end the stream, once those before them have been answered.
            self._unreadable = error

    async def _answer(
        self, request: InferRequest, before: "asyncio.Future[None] | None", done: "asyncio.Future[None]"
    ) -> None:
        try:
            async for answer in self._answers(request):
                if before is not None and not before.done():
                    await before
                await self._unread.put(answer)
        finally:
            self._free.release()
            if not done.done():
                done.set_result(None)
