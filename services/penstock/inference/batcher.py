"""Requests of one version, gathered into batches while the engine is busy.

An idle engine runs at once; while it runs, the queue grows; the next batch takes what has come. The event loop owns all
state; only gather, run and split happen on the batcher's thread.
"""

import asyncio
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import structlog

from penstock.inference.engine import Engine
from penstock.inference.signature import Signature
from penstock.inference.tensors import Array
from penstock.rpc.errors import NotReadyError, PenstockError

# The shapes of a request's inputs without their first axis; requests with equal ones fit into one batch.
RowShape = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Inference:
    """One request that agrees with its version's signature. `outputs` are the wanted ones, in the wanted order."""

    inputs: Mapping[str, Array]
    outputs: tuple[str, ...]
    rows: int


@dataclass(frozen=True)
class BatchLimits:
    """Most rows in one run, and most requests that wait."""

    max_batch_size: int
    max_queue_size: int


@dataclass(frozen=True)
class _Waiting:
    inference: Inference
    row_shape: RowShape
    answer: asyncio.Future[list[Array]]


_Batch = list[_Waiting]

_log = structlog.get_logger("penstock.inference.batcher")


class Batcher:
    """The queue of one engine, and the engine's only caller. `title` names the version in errors and logs."""

    def __init__(self, title: str, engine: Engine, signature: Signature, limits: BatchLimits) -> None:
        self._title = title
        self._engine = engine
        self._signature = signature
        self._limits = limits
        self._queue: deque[_Waiting] = deque()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="penstock-engine")
        self._working: asyncio.Task[None] | None = None
        self._draining = False

    async def infer(self, inference: Inference) -> list[Array]:
        """The wanted outputs of one request. A caller that is cancelled while it waits is not run.

        Raises `NotReadyError` if the queue is full or draining, and what the engine raises.
        """
        if self._draining:
            raise NotReadyError(f"{self._title} is being unloaded. Send the request again.")
        self._refuse_if_full()
        answer = asyncio.get_running_loop().create_future()
        self._queue.append(_Waiting(inference, _row_shape(inference), answer))
        if self._working is None:
            self._working = asyncio.create_task(self._work())
        outputs: list[Array] = await answer
        return outputs

    async def close(self) -> None:
        """Finishes what is queued, takes nothing new, and closes the engine."""
        self._draining = True
        if self._working is not None:
            await asyncio.wait([self._working])
        await asyncio.to_thread(self._thread.shutdown)
        self._engine.close()

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        try:
            while batch := self._schedule():
                outcomes = await loop.run_in_executor(self._thread, self._run, batch)
                _settle(batch, outcomes)
        finally:
            self._working = None

    def _schedule(self) -> _Batch:
        """The longest waiting request, and those behind it that fit beside it, in their order."""
        batch: _Batch = []
        passed_over: _Batch = []
        rows = 0
        while self._queue and (not batch or (self._signature.batched and rows < self._limits.max_batch_size)):
            waiting = self._queue.popleft()
            if waiting.answer.done():
                continue
            if batch and not self._fits(waiting, batch, rows):
                passed_over.append(waiting)
                continue
            batch.append(waiting)
            rows += waiting.inference.rows
        self._queue.extendleft(reversed(passed_over))
        return batch

    def _fits(self, waiting: _Waiting, batch: _Batch, rows: int) -> bool:
        fits = rows + waiting.inference.rows <= self._limits.max_batch_size
        return fits and waiting.row_shape == batch[0].row_shape

    def _run(self, batch: _Batch) -> list[list[Array] | Exception]:
        """An outcome for each request. A batch that fails is run again one by one: only the request at fault fails."""
        try:
            return list(self._run_together([waiting.inference for waiting in batch]))
        except Exception as error:  # whatever it is, it belongs to the caller and not to this thread
            if len(batch) == 1:
                return [error]
            _log.warning("batch failed, running its requests one by one", version=self._title, error=str(error))
        return [outcome for waiting in batch for outcome in self._run([waiting])]

    def _run_together(self, batch: Sequence[Inference]) -> Sequence[list[Array]]:
        if len(batch) == 1:
            return [self._engine.run(batch[0].inputs, batch[0].outputs)]
        wanted = [name for name in self._signature.outputs if any(name in inference.outputs for inference in batch)]
        inputs = {name: np.concatenate([one.inputs[name] for one in batch]) for name in self._signature.inputs}
        answers = dict(zip(wanted, self._engine.run(inputs, wanted), strict=True))
        return self._split(batch, answers)

    def _split(self, batch: Sequence[Inference], answers: Mapping[str, Array]) -> Sequence[list[Array]]:
        total = sum(inference.rows for inference in batch)
        for name, answer in answers.items():
            if answer.shape[:1] != (total,):
                raise PenstockError(f"Output {name!r} has shape {list(answer.shape)} for a batch of {total} rows.")
        parts, start = [], 0
        for inference in batch:
            end = start + inference.rows
            parts.append([answers[name][start:end] for name in inference.outputs])
            start = end
        return parts

    def _refuse_if_full(self) -> None:
        if len(self._queue) < self._limits.max_queue_size:
            return
        self._queue = deque(waiting for waiting in self._queue if not waiting.answer.done())
        if len(self._queue) >= self._limits.max_queue_size:
            raise NotReadyError(
                f"{self._title} has {len(self._queue)} requests waiting, as many as max_queue_size allows. "
                f"Send the request again after a pause."
            )


def _settle(batch: _Batch, outcomes: Sequence[list[Array] | Exception]) -> None:
    for waiting, outcome in zip(batch, outcomes, strict=True):
        if waiting.answer.done():
            continue
        if isinstance(outcome, Exception):
            waiting.answer.set_exception(outcome)
        else:
            waiting.answer.set_result(outcome)


def _row_shape(inference: Inference) -> RowShape:
    return tuple(array.shape[1:] for _, array in sorted(inference.inputs.items()))
