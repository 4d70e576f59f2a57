"""Requests to Python models that are not batched: one at a time on each instance, with any number of answers.

Answers are drawn from the model one by one, a few ahead of the client: a client that reads slowly slows its model down
and does not fill the memory. The event loop owns all state; an instance's thread computes the next answer when told to.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter_ns

from penstock.inference.inference import Inference, QueueFullError, Run
from penstock.inference.python_model import PythonEngine
from penstock.inference.statistics import Statistics
from penstock.inference.tensors import Array
from penstock.rpc.errors import DeadlineError, NotReadyError, PenstockError, UnimplementedError


@dataclass(frozen=True)
class StreamLimits:
    """Bounds of one version: requests that wait for an instance, answers that wait for their client, and how long."""

    max_queue_size: int
    # Answers that are computed before the client has taken those before.
    ahead: int = 4
    # A client that takes nothing for so long is cut off: it holds an instance that others wait for.
    stall_s: float = 60.0


class _Stream:
    """One request: what was answered and not yet taken, and who waits for whom."""

    def __init__(self, inference: Inference) -> None:
        self.inference = inference
        self.answers: deque[list[Array]] = deque()
        self.error: Exception | None = None
        # Whether an instance has begun; whether all answers are there; whether the client left.
        self.begun = False
        self.ended = False
        self.left = False
        self.timer: asyncio.TimerHandle | None = None
        self._given, self._taken = asyncio.Event(), asyncio.Event()

    def give(self, answer: list[Array]) -> None:
        self.answers.append(answer)
        self._given.set()

    def end(self, error: Exception | None = None) -> None:
        if not self.ended:
            self.ended, self.error = True, error
            self._given.set()

    def leave(self) -> None:
        self.left = True
        self._taken.set()

    async def take(self) -> list[Array] | None:
        """The next answer; None at the end. Raises what ended it early."""
        while not self.answers:
            error, self.error = self.error, None
            if error is not None:
                try:
                    raise error
                finally:
                    # It holds this frame; held by it in turn, it would keep the tensors until a garbage collection.
                    del error
            if self.ended:
                return None
            self._given.clear()
            await self._given.wait()
        self._taken.set()
        return self.answers.popleft()

    async def room(self, ahead: int) -> None:
        """Returns when fewer than `ahead` answers wait, or the client left."""
        while len(self.answers) >= ahead and not self.left:
            self._taken.clear()
            await self._taken.wait()


class _Instance:
    """A Python model and its thread."""

    def __init__(self, engine: PythonEngine) -> None:
        self.engine = engine
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="penstock-python")

    async def answers(self, inference: Inference) -> AsyncIterator[list[Array]]:
        """Each computed when it is asked for, on the thread. Must be closed there, by `aclose`."""
        loop = asyncio.get_running_loop()
        parameters = inference.parameters
        if not self.engine.decoupled:
            yield await loop.run_in_executor(
                self._thread, self.engine.answer, inference.inputs, inference.outputs, parameters
            )
            return
        iterator = self.engine.answers(inference.inputs, inference.outputs, parameters)
        try:
            while (answer := await loop.run_in_executor(self._thread, _next, iterator)) is not None:
                yield answer
        finally:
            await loop.run_in_executor(self._thread, iterator.close)  # type: ignore[attr-defined]

    async def close(self) -> None:
        await asyncio.get_running_loop().run_in_executor(self._thread, self.engine.close)
        self._thread.shutdown()


class PythonScheduler:
    """A `Scheduler` for Python models that are decoupled, or have no batches. `title` names the version in errors."""

    def __init__(
        self, title: str, engines: Sequence[PythonEngine], limits: StreamLimits, statistics: Statistics
    ) -> None:
        self._title = title
        self._limits = limits
        self._statistics = statistics
        self._instances = [_Instance(engine) for engine in engines]
        self._decoupled = any(engine.decoupled for engine in engines)
        self._idle = list(self._instances)
        # Unlike a deque, it lets go of one in the middle in no time.
        self._queue: OrderedDict[_Stream, None] = OrderedDict()
        self._working: set[asyncio.Task[None]] = set()
        self._draining = False

    async def infer(self, inference: Inference) -> list[Array]:
        """The one answer. Raises as `stream`, and `UnimplementedError` for a decoupled model."""
        if self._decoupled:
            self._statistics.failed(inference, "OTHER")
            raise UnimplementedError(
                f"{self._title}: ModelInfer RPC doesn't support models with decoupled transaction policy. Use "
                f"ModelStreamInfer."
            )
        stream = self._enqueue(inference)
        try:
            answer = await stream.take()
        except asyncio.CancelledError:
            self._leave(stream)
            raise
        if answer is None:
            raise PenstockError(f"{self._title} gave no answer.")
        return answer

    async def stream(self, inference: Inference) -> AsyncGenerator[list[Array]]:
        """The answers as the model gives them. Close it to cancel: the model's generator is then closed, too.

        Raises `QueueFullError`, `NotReadyError` if the queue drains, `DeadlineError` if the request waited too long or
        its answers were not taken, and `PenstockError` that names the model and its exception.
        """
        stream = self._enqueue(inference)
        try:
            while (answer := await stream.take()) is not None:
                yield answer
        finally:
            self._leave(stream)

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    async def close(self) -> None:
        """Finishes what is queued, takes nothing new, and closes the instances, each on its thread."""
        self._draining = True
        while self._working:
            await asyncio.wait(self._working)
        for instance in self._instances:
            await instance.close()

    def _enqueue(self, inference: Inference) -> _Stream:
        if self._draining:
            self._statistics.failed(inference, "REJECTED")
            raise NotReadyError(f"{self._title} is being unloaded. Send the request again.")
        if len(self._queue) >= self._limits.max_queue_size:
            self._statistics.failed(inference, "REJECTED")
            raise QueueFullError(self._title, len(self._queue))
        stream = _Stream(inference)
        self._queue[stream] = None
        if inference.timeout_us:
            loop = asyncio.get_running_loop()
            stream.timer = loop.call_later(inference.timeout_us / 1e6, self._expire, stream)
        if self._idle:
            working = asyncio.create_task(self._work(self._idle.pop()))
            self._working.add(working)
            working.add_done_callback(self._working.discard)
        return stream

    async def _work(self, instance: _Instance) -> None:
        """Answers what waits, one request after another, until nothing does."""
        try:
            while self._queue:
                stream, _ = self._queue.popitem(last=False)
                stream.begun = True
                if stream.timer is not None:
                    stream.timer.cancel()
                await self._answer(instance, stream)
        finally:
            self._idle.append(instance)

    async def _answer(self, instance: _Instance, stream: _Stream) -> None:
        inference, limits = stream.inference, self._limits
        now_ns = perf_counter_ns()
        run = inference.run = Run(inference.rows, now_ns, now_ns)
        answers = instance.answers(inference)
        error: Exception | None = None
        try:
            async for answer in answers:
                run.ran_ns = run.settled_ns = perf_counter_ns()
                stream.give(answer)
                async with asyncio.timeout(limits.stall_s):
                    await stream.room(limits.ahead if instance.engine.decoupled else 2)
                if stream.left:
                    break
        except TimeoutError:
            error = DeadlineError(f"{self._title}: no answer was taken for {limits.stall_s:g} s; the rest is dropped.")
        except Exception as raised:  # whatever it is, it belongs to the client and not to this task
            error = raised
        finally:
            await answers.aclose()  # type: ignore[attr-defined]
        run.ran_ns = run.settled_ns = perf_counter_ns()
        if error is None and not stream.left:
            self._statistics.succeeded(run, [inference])
        else:
            reason = "CANCELED" if error is None else "REJECTED" if isinstance(error, DeadlineError) else "BACKEND"
            self._statistics.failed(inference, reason)
        stream.end(error)

    def _leave(self, stream: _Stream) -> None:
        stream.leave()
        if not stream.begun and not stream.ended:
            self._drop(stream)
            self._statistics.failed(stream.inference, "CANCELED")

    def _expire(self, stream: _Stream) -> None:
        if not stream.begun:
            self._drop(stream)
            self._statistics.failed(stream.inference, "REJECTED")
            stream.end(
                DeadlineError(
                    f"The request's timeout of {stream.inference.timeout_us / 1e6:g} s passed before it was run."
                )
            )

    def _drop(self, stream: _Stream) -> None:
        del self._queue[stream]
        if stream.timer is not None:
            stream.timer.cancel()


def _next(iterator: Iterator[list[Array]]) -> list[Array] | None:
    # StopIteration cannot leave a thread through a future.
    return next(iterator, None)
