"""Requests that belong together: the steps of a sequence run in order, steps of different sequences in one batch.

A sequence is held by one instance from its START to its END. The event loop owns all state; an instance's thread is
given what a run needs and gives back what came of it.
"""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Sequence
from functools import partial
from heapq import heappop, heappush
from itertools import count
from pathlib import Path
from time import perf_counter_ns

import structlog

from penstock.inference.engine import Engine
from penstock.inference.inference import Inference, QueueFullError, Run, SequenceStep
from penstock.inference.sequence_config import SequenceConfig, SequenceLimits, visible
from penstock.inference.sequence_run import Answer, Outcome, Row, States
from penstock.inference.sequence_state import LiveSequence, Step, Worker
from penstock.inference.signature import Signature
from penstock.inference.statistics import Statistics
from penstock.inference.tensors import Array
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import DeadlineError, InvalidFieldError, NotReadyError

__all__ = ["SequenceLimits", "SequenceScheduler", "visible"]

_log = structlog.get_logger("penstock.inference.sequences")


class SequenceScheduler:
    """A `Scheduler` for models with `sequence_batching`. `title` names the version in errors and logs."""

    def __init__(
        self,
        title: str,
        engines: Sequence[Engine],
        signature: Signature,
        config: ModelConfig,
        limits: SequenceLimits,
        statistics: Statistics,
        initial_states: Path | None = None,
    ) -> None:
        """Raises `WrongStateError` for a configuration that cannot be served.

        `signature` is the model's own, `visible` what requests are checked against. `initial_states` is the model's
        folder `initial_state`, where files of first states lie.
        """
        self._title = title
        self._config = SequenceConfig.of(config, signature, initial_states)
        self._limits = limits
        self._statistics = statistics
        self._initial: States = {state.input: state.initial for state in self._config.states}
        self._workers = [Worker(engine, self._config) for engine in engines]
        self._sequences: dict[int | str, LiveSequence] = {}
        # Sequences that no instance holds yet, in the order in which they came.
        self._backlog: deque[LiveSequence] = deque()
        # Sequences of which nothing waits or runs, the one that rests longest first.
        self._resting: dict[int | str, LiveSequence] = {}
        self._sweep_timer: asyncio.TimerHandle | None = None
        self._offers = count()
        self._waiting = 0
        self._draining = False
        self._drained = asyncio.Event()

    async def infer(self, inference: Inference) -> list[Array]:
        """The wanted outputs of one step.

        A caller that is cancelled while its step waits leaves the sequence as it was; a step that has begun is finished
        also when its caller left. Raises `InvalidFieldError` if the step belongs to no sequence, `NotReadyError` if
        there are too many sequences or steps or the version is being unloaded, `DeadlineError` if it waited too long,
        and what the engine raises: then, too, the sequence is as it was.
        """
        step = self._enqueue(inference)
        try:
            return await step.answer
        except asyncio.CancelledError:
            self._statistics.failed(inference, "CANCELED")
            self._leave(step)
            raise
        finally:
            del step  # an error holds this frame, and must not be held by it in turn

    async def stream(self, inference: Inference) -> AsyncGenerator[list[Array]]:
        """The one answer of a step."""
        yield await self.infer(inference)

    @property
    def pending(self) -> int:
        """Steps that wait."""
        return self._waiting

    async def close(self) -> None:
        """Finishes the steps that wait, takes no new ones, forgets all sequences, and closes the engines."""
        self._draining = True
        for sequence in list(self._resting.values()):
            self._forget(sequence)
        if self._sweep_timer is not None:
            self._sweep_timer.cancel()
        for worker in self._workers:
            self._schedule(worker)
        if not self._is_drained():
            await self._drained.wait()
        for worker in self._workers:
            if worker.scheduled is not None:
                worker.scheduled.cancel()
            await asyncio.to_thread(worker.thread.shutdown)
            worker.engine.close()

    def _enqueue(self, inference: Inference) -> Step:
        loop = asyncio.get_running_loop()
        step, sequence = self._checked(inference)
        if sequence is None:
            if len(self._sequences) >= self._limits.max_sequences:
                raise self._rejected(
                    inference,
                    f"{self._title} has {len(self._sequences)} sequences running, as many as max_sequences allows. End "
                    f"one with its END flag, or start this one again after a pause.",
                )
            sequence = self._sequences[step.id] = LiveSequence(step.id)
            self._seat(sequence)
        self._resting.pop(step.id, None)
        waiting = Step(inference, step, sequence, loop.create_future())
        sequence.steps.append(waiting)
        self._waiting += 1
        if inference.timeout_us:
            waiting.timer = loop.call_later(inference.timeout_us / 1e6, self._expire, waiting)
        self._offer(sequence)
        return waiting

    def _checked(self, inference: Inference) -> tuple[SequenceStep, LiveSequence | None]:
        """The step, and its sequence if that runs."""
        step = inference.sequence
        if step is None or not step.id:
            raise self._refused(
                inference,
                "parameters[sequence_id]",
                f"inference request to {self._title} must specify a non-zero or non-empty correlation ID",
            )
        if self._config.batched and inference.rows != 1:
            raise self._refused(
                inference,
                "inputs",
                f"inference request to {self._title} must specify batch-size 1, as all steps of sequences; got "
                f"{inference.rows} rows",
            )
        for control in self._config.controls:
            try:
                control.check_id(self._title, step.id)
            except InvalidFieldError:
                self._statistics.failed(inference, "OTHER")
                raise
        if self._draining:
            raise self._rejected(inference, f"{self._title} is being unloaded. Start the sequence again.")
        sequence = self._sequences.get(step.id)
        if not step.start and (sequence is None or sequence.ends):
            raise self._unstarted(inference, step)
        if self._waiting >= self._limits.max_queue_size:
            self._statistics.failed(inference, "REJECTED")
            raise QueueFullError(self._title, self._waiting)
        return step, sequence

    def _seat(self, sequence: LiveSequence) -> None:
        """Has the instance that holds the fewest hold the sequence, or puts it into the backlog."""
        worker = min(self._workers, key=lambda one: one.held)
        if self._config.seats is not None and worker.held >= self._config.seats:
            self._backlog.append(sequence)
            return
        worker.held += 1
        sequence.worker = worker
        if worker.free_places:
            sequence.place = heappop(worker.free_places)

    def _unseat(self, sequence: LiveSequence) -> None:
        """Has its instance hold it no longer, and the next of the backlog instead."""
        worker = sequence.worker
        if worker is None:
            self._backlog.remove(sequence)
            return
        sequence.worker = None
        worker.held -= 1
        if self._config.fixed_rows:
            heappush(worker.free_places, sequence.place)
        if self._backlog:
            following = self._backlog.popleft()
            self._seat(following)
            self._offer(following)

    def _offer(self, sequence: LiveSequence) -> None:
        """Lets the sequence's next step be run, if it may be."""
        worker = sequence.worker
        if worker is None or sequence.running is not None or not sequence.steps:
            return
        if not sequence.offered:
            sequence.offered = True
            heappush(worker.ready, (sequence.steps[0].inference.arrival_ns, next(self._offers), sequence))
        self._schedule(worker)

    def _schedule(self, worker: Worker) -> None:
        """Has an idle worker look for work in the next tick, also if it waits for a batch to fill."""
        if worker.busy:
            return
        if isinstance(worker.scheduled, asyncio.TimerHandle):
            worker.scheduled.cancel()
            worker.scheduled = None
        if worker.scheduled is None:
            worker.scheduled = asyncio.get_running_loop().call_soon(self._work, worker)

    def _work(self, worker: Worker) -> None:
        worker.scheduled = None
        if worker.busy:
            return
        loop = asyncio.get_running_loop()
        alive = [sequence for _, _, sequence in worker.ready if sequence.steps]
        if alive and not self._draining and self._config.delay_s and len(alive) < self._config.enough:
            oldest_ns = min(sequence.steps[0].inference.arrival_ns for sequence in alive)
            delay_s = self._config.delay_s - (perf_counter_ns() - oldest_ns) / 1e9
            if delay_s > 0:
                worker.scheduled = loop.call_later(delay_s, self._work, worker)
                return
        if steps := self._take(worker, self._config.batch_limit(len(alive))):
            worker.busy = True
            running = loop.run_in_executor(worker.thread, worker.runner.run, self._title, self._rows(steps))
            running.add_done_callback(partial(self._ended, worker, steps))
        self._is_drained()

    def _take(self, worker: Worker, limit: int) -> list[Step]:
        """The oldest step that is ready, and others of the same shapes beside it."""
        steps: list[Step] = []
        passed_over: list[tuple[int, int, LiveSequence]] = []
        key: object = None
        while worker.ready and len(steps) < limit:
            entry = heappop(worker.ready)
            sequence = entry[2]
            step = self._first(sequence)
            if step is None:
                sequence.offered = False
                self._rest(sequence)
                continue
            step_key = self._key(step)
            if steps and step_key != key:
                passed_over.append(entry)
                continue
            key = step_key
            sequence.offered = False
            self._unqueue(step)
            sequence.running = step
            steps.append(step)
        for entry in passed_over:
            heappush(worker.ready, entry)
        # Outcomes come in the order of rows.
        return sorted(steps, key=lambda step: step.sequence.place) if self._config.fixed_rows else steps

    def _first(self, sequence: LiveSequence) -> Step | None:
        """The step to run next. Those before it whose callers left, or whose START failed, are done with."""
        while sequence.steps:
            step = sequence.steps[0]
            if step.answer.done():
                self._unqueue(step)
            elif sequence.states is None and not step.step.start:
                self._unqueue(step)
                step.answer.set_exception(self._unstarted(step.inference, step.step))
            else:
                return step
        return None

    def _key(self, step: Step) -> object:
        """What has to be equal for two steps to share a run: the shapes of what they are made of."""
        arrays = (*sorted(step.inference.inputs.items()), *self._states(step).items())
        return [(name, array.shape) for name, array in arrays]

    def _states(self, step: Step) -> States:
        states = step.sequence.states
        return self._initial if step.step.start or states is None else states

    def _rows(self, steps: Sequence[Step]) -> list[Row | None]:
        rows = [Row(step.inference, self._states(step)) for step in steps]
        if not self._config.has_holes:
            return list(rows)
        placed: list[Row | None] = [None] * (1 + max(step.sequence.place for step in steps))
        for step, row in zip(steps, rows, strict=True):
            placed[step.sequence.place] = row
        return placed

    def _ended(
        self, worker: Worker, steps: Sequence[Step], running: "asyncio.Future[list[tuple[Run, Outcome]]]"
    ) -> None:
        worker.busy = False
        succeeded: dict[int, tuple[Run, list[Inference]]] = {}
        for step, (run, outcome) in zip(steps, running.result(), strict=True):
            self._settle(step, run, outcome)
            if isinstance(outcome, Answer) and not step.answer.cancelled():
                succeeded.setdefault(id(run), (run, []))[1].append(step.inference)
        for run, inferences in succeeded.values():
            run.settled_ns = perf_counter_ns()
            self._statistics.succeeded(run, inferences)
        for step in steps:
            self._rest(step.sequence)
        if worker.ready:
            self._schedule(worker)
        self._is_drained()

    def _settle(self, step: Step, run: Run, outcome: Outcome) -> None:
        sequence = step.sequence
        sequence.running = None
        if isinstance(outcome, Answer):
            sequence.states = None if step.step.end else outcome.states
            if not step.answer.done():
                step.inference.run = run
                step.answer.set_result(outcome.outputs)
            if step.step.end and sequence.steps:
                # What follows is another sequence with this id, and takes its turn behind those that wait.
                self._unseat(sequence)
                self._seat(sequence)
        elif not step.answer.done():
            self._statistics.failed(step.inference, "BACKEND")
            step.answer.set_exception(outcome)

    def _rest(self, sequence: LiveSequence) -> None:
        """Sees to a sequence after something of it was done with."""
        if sequence.running is not None or self._sequences.get(sequence.id) is not sequence:
            return
        if sequence.steps:
            self._offer(sequence)
        elif sequence.states is None or self._draining:
            self._forget(sequence)
        elif sequence.id not in self._resting:
            loop = asyncio.get_running_loop()
            sequence.rested_s = loop.time()
            self._resting[sequence.id] = sequence
            if self._sweep_timer is None:
                self._sweep_timer = loop.call_later(self._config.idle_s, self._sweep)

    def _sweep(self) -> None:
        """Forgets sequences that rested too long: their clients may never come back."""
        loop = asyncio.get_running_loop()
        self._sweep_timer = None
        while self._resting:
            sequence = next(iter(self._resting.values()))
            until_s = sequence.rested_s + self._config.idle_s
            if until_s > loop.time():
                self._sweep_timer = loop.call_at(until_s, self._sweep)
                return
            _log.info("idle sequence dropped", version=self._title, sequence=sequence.id)
            self._forget(sequence)

    def _forget(self, sequence: LiveSequence) -> None:
        del self._sequences[sequence.id]
        self._resting.pop(sequence.id, None)
        self._unseat(sequence)

    def _leave(self, step: Step) -> None:
        """Takes a step whose caller left out of the queue."""
        if step.waits:
            self._unqueue(step)
            self._rest(step.sequence)
            self._is_drained()

    def _unqueue(self, step: Step) -> None:
        step.waits = False
        step.sequence.steps.remove(step)
        self._waiting -= 1
        if step.timer is not None:
            step.timer.cancel()

    def _expire(self, step: Step) -> None:
        if step.waits and not step.answer.done():
            self._statistics.failed(step.inference, "REJECTED")
            step.answer.set_exception(
                DeadlineError(
                    f"The request's timeout of {step.inference.timeout_us / 1e6:g} s passed before it was run."
                )
            )
            self._leave(step)

    def _is_drained(self) -> bool:
        if self._draining and not self._waiting and not any(worker.busy for worker in self._workers):
            self._drained.set()
        return self._drained.is_set()

    def _unstarted(self, inference: Inference, step: SequenceStep) -> InvalidFieldError:
        return self._refused(
            inference,
            "parameters[sequence_start]",
            f"inference request for sequence {str(step.id)[:80]} to {self._title} must specify the START flag on the "
            f"first request of the sequence",
        )

    def _refused(self, inference: Inference, field: str, description: str) -> InvalidFieldError:
        self._statistics.failed(inference, "OTHER")
        return InvalidFieldError.of(field, description)

    def _rejected(self, inference: Inference, message: str) -> NotReadyError:
        self._statistics.failed(inference, "REJECTED")
        return NotReadyError(message)
