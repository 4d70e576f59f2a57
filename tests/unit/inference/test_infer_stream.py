"""One stream of requests: what is begun, what waits for its reader, and what is left when that leaves."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator

import pytest

from penstock.inference.infer_stream import InferStream
from penstock.inference.wire import InferRequest
from penstock.oip import inference_pb2 as pb
from penstock.rpc.methods import Encoded


class Server:
    """Answers each request, once it may, with `answers` messages of `answer_bytes`."""

    def __init__(self, max_bytes: int, answer_bytes: int = 1) -> None:
        self.begun: list[InferRequest] = []
        self.gate = asyncio.Event()
        self.left = 0
        self._answer = Encoded(bytes(answer_bytes))
        self.stream = InferStream(self._answers, lambda _: True, max_bytes)

    async def _answers(self, request: InferRequest) -> AsyncGenerator[Encoded]:
        self.begun.append(request)
        try:
            await self.gate.wait()
            yield self._answer
        finally:
            self.left += 1


async def requests(*sizes: int) -> AsyncIterator[InferRequest]:
    for size in sizes:
        yield InferRequest(pb.ModelInferRequest(), (), size, None)


async def settled() -> None:
    for _ in range(50):
        await asyncio.sleep(0)


async def collected(answers: AsyncIterator[Encoded]) -> int:
    return len([answer async for answer in answers])


@pytest.mark.parametrize(("sizes", "at_once"), [((40, 40, 40, 40), 2), ((500, 1), 1), ((1, 500), 1), ((1,) * 80, 16)])
async def test_no_request_is_begun_beyond_the_bytes_that_a_stream_may_hold(
    sizes: tuple[int, ...], at_once: int
) -> None:
    server = Server(max_bytes=100)
    reading = asyncio.create_task(collected(server.stream.responses(requests(*sizes))))
    await settled()
    assert len(server.begun) == at_once
    server.gate.set()
    assert await reading == len(sizes)


async def test_answers_that_nobody_reads_count_too() -> None:
    server = Server(max_bytes=100, answer_bytes=30)
    server.gate.set()
    answers = server.stream.responses(requests(*[20] * 50))
    await anext(answers)
    await settled()
    assert len(server.begun) < 10
    assert 1 + await collected(answers) == 50


async def test_answers_that_are_still_to_come_are_taken_to_be_as_large_as_those_before() -> None:
    server = Server(max_bytes=1000, answer_bytes=300)
    reading = asyncio.create_task(collected(server.stream.responses(requests(*[1] * 50))))
    await settled()
    assert len(server.begun) == 16
    server.gate.set()
    await settled()
    server.gate.clear()
    await settled()
    begun = len(server.begun) - server.left
    server.gate.set()
    assert await reading == 50
    assert begun <= 3


@pytest.mark.parametrize("unread", [False, True])
async def test_closing_a_stream_ends_everything_that_belongs_to_it(unread: bool) -> None:
    server = Server(max_bytes=1000)
    answers = server.stream.responses(requests(*[1] * 100))
    first = asyncio.ensure_future(anext(answers))
    await settled()
    if unread:
        server.gate.set()
    else:
        first.cancel()
    await asyncio.wait([first])
    await settled()
    await answers.aclose()
    assert server.left == len(server.begun) >= 16
    assert asyncio.all_tasks() == {asyncio.current_task()}
