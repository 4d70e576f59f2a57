"""Requests of one version, gathered into batches while its instances are busy.

An idle instance runs what came within one tick of the event loop; while it runs, the queue grows; the next batch takes
what has come. The event loop owns all state; only `Instance.run` happens elsewhere, for models that are too slow for
the loop.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from time import perf_counter_ns

import structlog

from penstock.inference.batch_options import BatchOptions
from penstock.inference.gather import row_key
from penstock.inference.inference import Inference, QueueFullError, Run
from penstock.inference.instance import Executed, Instance, Outcome
from penstock.inference.queue import Queue, Waiting
from penstock.inference.signature import Signature
from penstock.inference.statistics import Statistics
from penstock.inference.tensors import Array
from penstock.rpc.errors import DeadlineError, NotReadyError
from penstock.rpc.logs import debug_enabled

_log = structlog.get_logger("penstock.inference.batcher")


class _Batch:
    """Requests that run together, and what came of them."""

    __slots__ = ("executed", "inferences", "requests", "rows")

    def __init__(self, requests: list[Waiting]) -> None:
        self.requests = requests
        self.inferences = [waiting.inference for waiting in requests]
        self.rows = sum([one.rows for one in self.inferences])
        self.executed: list[Executed] | None = None


class Batcher:
    """The queue of one version, and its instances' only caller. `title` names the version in errors and logs."""

    def __init__(
        self,
        title: str,
        instances: Sequence[Instance],
        signature: Signature,
        options: BatchOptions,
        statistics: Statistics,
    ) -> None:
        self._title = title
        self._instances = instances
        self._signature = signature
        self._options = options
        self._statistics = statistics
        self._queue = Queue(options.priority_levels)
        self._idle: list[Instance] = list(reversed(instances))
        # Batches in the order in which they were begun, for models that answer in order.
        self._begun: deque[_Batch] = deque()
        self._working: set[asyncio.Future[list[Executed]]] = set()
        # The next look at the queue; `_patient` if it waits for a batch to fill.
        self._scheduled: asyncio.Handle | None = None
        self._patient = False
        # Whether requests come several in one tick, so that it pays to wait for the others; and whether one has already
        # been run in this tick without waiting.
        self._crowded = False
        self._ran_alone = False
        self._draining = False
        self._drained = asyncio.Event()

    async def infer(self, inference: Inference) -> list[Array]:
        """The wanted outputs of one request. A caller that is cancelled while it waits is not run.

        Raises `QueueFullError`, `NotReadyError` if the queue drains, `DeadlineError` if the request waited too long,
        and what the engine raises.
        """
        loop = asyncio.get_running_loop()
        if not self._crowded and self._may_run_alone(inference):
            return self._run_alone(loop, inference)
        answer: asyncio.Future[list[Array]] = loop.create_future()
        waiting = self._enqueue(loop, inference, answer)
        try:
            return await answer
        except asyncio.CancelledError:
            self._forget(waiting)
            self._statistics.failed(inference, "CANCELED")
            raise
        finally:
            # An error holds this frame; held by it in turn, it would keep the tensors until a garbage collection.
            del answer, waiting

    async def stream(self, inference: Inference) -> AsyncGenerator[list[Array]]:
        """The one answer of a model that is not decoupled."""
        yield await self.infer(inference)

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    async def close(self) -> None:
        """Finishes what is queued, takes nothing new, and closes the instances."""
        self._draining = True
        if self._queue or self._working:
            self._work_soon(asyncio.get_running_loop())
            await self._drained.wait()
        for instance in self._instances:
            await instance.close()

    def _enqueue(
        self, loop: asyncio.AbstractEventLoop, inference: Inference, answer: "asyncio.Future[list[Array]]"
    ) -> Waiting:
        options = self._options
        # As in Triton, a level that the model does not have is its default level.
        level = inference.priority if 0 < inference.priority <= options.priority_levels else options.default_level
        if self._draining:
            self._statistics.failed(inference, "REJECTED")
            raise NotReadyError(f"{self._title} is being unloaded. Send the request again.")
        policy = options.policy(level)
        if (size := self._queue.length(level)) >= policy.max_queue_size:
            self._statistics.failed(inference, "REJECTED")
            raise QueueFullError(self._title, size)
        waiting = Waiting(inference, row_key(self._signature, options.padding, inference), answer)
        self._queue.append(level, waiting)
        if limit_us := policy.timeout_of(inference.timeout_us):
            waited_too_long = self._delay if policy.delays else self._expire
            waiting.timer = loop.call_later(limit_us / 1e6, waited_too_long, waiting, limit_us)
        if self._idle and (self._scheduled is None or self._patient):
            self._work_soon(loop)
        return waiting

    def _forget(self, waiting: Waiting) -> None:
        """Has a request whose caller no longer waits hold nothing here."""
        self._queue.discard(waiting)
        if waiting.timer is not None:
            waiting.timer.cancel()

    def _may_run_alone(self, inference: Inference) -> bool:
        """Whether a request need not wait for the next tick: nobody else came in this one, and it runs on the loop."""
        if self._ran_alone:
            self._crowded = True
            return False
        instance = self._idle[-1] if self._idle else None
        return (
            instance is not None
            and inference.rows <= instance.loop_rows
            and not inference.priority
            and not self._options.max_queue_delay_us
            and not self._draining
            and not self._queue
        )

    def _run_alone(self, loop: asyncio.AbstractEventLoop, inference: Inference) -> list[Array]:
        """Spares a client that is alone two turns of the loop."""
        self._ran_alone = True
        (executed,) = self._idle[-1].run(self._title, [inference])
        (outcome,) = executed.outcomes
        inference.run = executed.run
        executed.run.settled_ns = perf_counter_ns()
        # The answer does not wait for it to be counted.
        loop.call_soon(self._ended_alone, inference, executed.run, outcome)
        if isinstance(outcome, Exception):
            try:
                raise outcome
            finally:
                del executed, outcome  # as in `infer`
        return outcome

    def _ended_alone(self, inference: Inference, run: Run, outcome: Outcome) -> None:
        self._ran_alone = False
        if isinstance(outcome, Exception):
            self._statistics.failed(inference, "BACKEND")
        else:
            self._count(run, [inference])

    def _expire(self, waiting: Waiting, limit_us: int) -> None:
        if not waiting.answer.done():
            self._forget(waiting)
            self._statistics.failed(waiting.inference, "REJECTED")
            waiting.answer.set_exception(
                DeadlineError(f"The request's timeout of {limit_us / 1e6:g} s passed before it was run.")
            )

    def _delay(self, waiting: Waiting, limit_us: int) -> None:
        if not waiting.answer.done():
            self._queue.put_behind(waiting)

    def _work_soon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Sees to the queue in the next tick, also where it was to wait for more requests."""
        if self._patient and self._scheduled is not None:
            self._scheduled.cancel()
            self._scheduled = None
        if self._scheduled is None:
            self._patient = False
            self._scheduled = loop.call_soon(self._work)

    def _work(self) -> None:
        """Gives idle instances what waits. One batch on the loop a tick, so that the loop sees to others, too."""
        self._scheduled, self._patient = None, False
        loop = asyncio.get_running_loop()
        while self._idle and self._queue:
            if (delay_s := self._delay_s()) > 0:
                self._patient = True
                self._scheduled = loop.call_later(delay_s, self._work)
                return
            if not (requests := self._take()):
                break
            if self._begin(loop, requests):
                break
        if self._queue and self._idle:
            self._work_soon(loop)
        elif self._draining and not self._queue and not self._working:
            self._drained.set()

    def _delay_s(self) -> float:
        """How long a batch that is not full yet may still wait for others."""
        options = self._options
        if not options.max_queue_delay_us or self._draining:
            return 0
        rows, oldest_ns = self._queue.waiting_rows()
        full = options.preferred_batch_sizes[0] if options.preferred_batch_sizes else options.max_batch_size
        if oldest_ns is None or rows >= full:
            return 0
        return options.max_queue_delay_us / 1e6 - (perf_counter_ns() - oldest_ns) / 1e9

    def _take(self) -> list[Waiting]:
        options = self._options
        limit = options.max_batch_size
        if options.preferred_batch_sizes:
            rows, _ = self._queue.waiting_rows()
            limit = max((size for size in options.preferred_batch_sizes if size <= rows), default=limit)
        requests = self._queue.take(limit)
        for waiting in requests:
            if waiting.timer is not None:
                waiting.timer.cancel()
        return requests

    def _begin(self, loop: asyncio.AbstractEventLoop, requests: list[Waiting]) -> bool:
        """Runs a batch, on the loop if it is small enough for that: then it is done, and the answer is true."""
        instance = self._idle[-1]
        batch = _Batch(requests)
        if self._options.preserve_ordering:
            self._begun.append(batch)
        if batch.rows <= instance.loop_rows:
            self._crowded = len(requests) > 1
            self._settle(batch, instance.run(self._title, batch.inferences))
            return True
        self._idle.pop()
        running, stop = instance.run_on_thread(self._title, batch.inferences)
        self._working.add(running)
        alive = len(requests)

        def left(answer: "asyncio.Future[list[Array]]") -> None:
            nonlocal alive
            alive -= 1
            # Nobody is left to answer; the answers of a run that ended count as left, too, which hurts nobody.
            if not alive:
                stop.stop()

        for waiting in requests:
            waiting.answer.add_done_callback(left)

        def ended(future: "asyncio.Future[list[Executed]]") -> None:
            self._working.discard(future)
            self._idle.append(instance)
            self._settle(batch, future.result())
            if self._queue or self._draining:
                self._work_soon(loop)

        running.add_done_callback(ended)
        return False

    def _settle(self, batch: _Batch, executed: list[Executed]) -> None:
        batch.executed = executed
        if not self._options.preserve_ordering:
            self._answer(batch, executed)
            return
        while self._begun and (known := self._begun[0].executed) is not None:
            self._answer(self._begun.popleft(), known)

    def _answer(self, batch: _Batch, executed: list[Executed]) -> None:
        start = 0
        for one in executed:
            end = start + len(one.outcomes)
            self._answer_run(batch.requests[start:end], one)
            start = end

    def _answer_run(self, requests: list[Waiting], executed: Executed) -> None:
        run = executed.run
        succeeded = []
        for waiting, outcome in zip(requests, executed.outcomes, strict=True):
            answer = waiting.answer
            if answer.done():
                continue
            if isinstance(outcome, list):
                waiting.inference.run = run
                succeeded.append(waiting.inference)
                answer.set_result(outcome)
            else:
                self._statistics.failed(waiting.inference, "BACKEND")
                answer.set_exception(outcome)
        if succeeded:
            run.settled_ns = perf_counter_ns()
            self._count(run, succeeded)

    def _count(self, run: Run, inferences: list[Inference]) -> None:
        self._statistics.succeeded(run, inferences)
        if debug_enabled():
            _log.debug(
                "batch",
                version=self._title,
                requests=len(inferences),
                rows=run.rows,
                waiting=len(self._queue),
                queue_us=(run.start_ns - inferences[0].arrival_ns) // 1000,
                gather_us=(run.gathered_ns - run.start_ns) // 1000,
                run_us=(run.ran_ns - run.gathered_ns) // 1000,
                settle_us=(run.settled_ns - run.ran_ns) // 1000,
            )
