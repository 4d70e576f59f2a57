"""Requests that wait for an instance, the most urgent level first, in order within it. Bounded.

Whoever no longer waits is taken out at once: a request's tensors are large, and an instance may be busy for long.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Iterator

from penstock.inference.gather import RowKey
from penstock.inference.inference import Inference
from penstock.inference.tensors import Array


class Waiting:
    """One request in the queue, and who waits for its answer."""

    __slots__ = ("answer", "inference", "key", "level", "timer")

    def __init__(self, inference: Inference, key: RowKey, answer: "asyncio.Future[list[Array]]") -> None:
        self.inference = inference
        self.key = key
        self.answer = answer
        self.level = 0
        self.timer: asyncio.TimerHandle | None = None


class Queue:
    """Level 1 is the most urgent. What waited too long but may still run has a level behind all."""

    def __init__(self, levels: int) -> None:
        # Unlike a deque, it lets go of one in the middle in no time.
        self._levels: list[OrderedDict[Waiting, None]] = [OrderedDict() for _ in range(levels + 1)]

    def __len__(self) -> int:
        return sum(map(len, self._levels))

    def __iter__(self) -> Iterator[Waiting]:
        return (waiting for level in self._levels for waiting in level)

    def length(self, level: int) -> int:
        """How many wait in a level."""
        return len(self._levels[level - 1])

    def append(self, level: int, waiting: Waiting) -> None:
        waiting.level = level
        self._levels[level - 1][waiting] = None

    def discard(self, waiting: Waiting) -> None:
        """Forgets a request if it is still here."""
        self._levels[waiting.level - 1].pop(waiting, None)

    def put_behind(self, waiting: Waiting) -> None:
        """Moves a request behind those of all levels."""
        self.discard(waiting)
        self.append(len(self._levels), waiting)

    def take(self, max_rows: int) -> list[Waiting]:
        """The first request that waits, and those behind it that fit beside it into `max_rows` rows, in their order.

        `max_rows` 0: one request alone. A request that does not fit lets smaller ones pass, but keeps its place.
        """
        batch: list[Waiting] = []
        rows = 0
        for queue in self._levels:
            if not queue:
                continue
            passed_over: list[Waiting] = []
            while queue and (not batch or rows < max_rows):
                waiting, _ = queue.popitem(last=False)
                if waiting.answer.done():
                    continue
                if batch and (rows + waiting.inference.rows > max_rows or waiting.key != batch[0].key):
                    passed_over.append(waiting)
                    continue
                batch.append(waiting)
                rows += waiting.inference.rows
            for waiting in reversed(passed_over):
                queue[waiting] = None
                queue.move_to_end(waiting, last=False)
        return batch

    def waiting_rows(self) -> tuple[int, int | None]:
        """The rows that wait, and the arrival of the oldest request, nanoseconds."""
        alive = [waiting.inference for waiting in self if not waiting.answer.done()]
        return sum(one.rows for one in alive), min((one.arrival_ns for one in alive), default=None)
