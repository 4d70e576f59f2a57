"""Models made of models: the outputs of some steps are the inputs of others.

A step begins as soon as its inputs are there, so what does not depend on one another runs at the same time.
"""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextvars import ContextVar
from time import perf_counter_ns

from penstock.inference.ensemble_graph import EnsembleGraph, Lookup, Member, Step
from penstock.inference.inference import Inference, Run
from penstock.inference.signature import Signature
from penstock.inference.statistics import Statistics
from penstock.inference.tensors import Array
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import (
    DeadlineError,
    InvalidFieldError,
    NotFoundError,
    NotReadyError,
    PenstockError,
    WrongStateError,
)

__all__ = ["EnsembleScheduler", "Lookup", "Member"]

# The ensembles that the present request has come through, with their titles. Tasks inherit it.
_entered: ContextVar[tuple[tuple[int, str], ...]] = ContextVar("entered", default=())


class EnsembleScheduler:
    """A `Scheduler` over other versions' schedulers. It holds no queue: its steps wait in those of their models."""

    def __init__(
        self, title: str, config: ModelConfig, signature: Signature, lookup: Lookup, statistics: Statistics
    ) -> None:
        """Raises `WrongStateError` for a graph that cannot run, whatever its models are. `check` looks at those."""
        self._title = title
        self._graph = EnsembleGraph(title, config, signature)
        self._lookup = lookup
        self._statistics = statistics
        self._running = 0
        self._draining = False
        self._drained = asyncio.Event()

    @property
    def models(self) -> frozenset[tuple[str, str]]:
        """The models that it consists of, each with its version; "" is the served one."""
        return frozenset((step.model, step.version) for step in self._graph.steps)

    def check(self) -> None:
        """Looks all models up and compares their signatures with what they are given.

        Raises `WrongStateError` where they do not fit, and what `lookup` and the models raise: `NotReadyError` while
        one is not ready.
        """
        self._graph.check(self._lookup)

    async def infer(self, inference: Inference) -> list[Array]:
        """The wanted outputs; steps that they do not need are not run. Cancelling it cancels its steps.

        Raises what the steps' models raise, `DeadlineError` if the time ran out between two steps, `NotReadyError`
        while it is being unloaded, and `WrongStateError` if a model of it has become an ensemble with it in it.
        """
        entered = _entered.get()
        if self._draining:
            self._statistics.failed(inference, "REJECTED")
            raise NotReadyError(f"{self._title} is being unloaded. Send the request again.")
        inside = (*entered, (id(self), self._title))
        if id(self) in {one for one, _ in entered}:
            self._statistics.failed(inference, "BACKEND")
            raise WrongStateError(f"{self._title} is part of itself: {' → '.join(title for _, title in inside)}.")
        token = _entered.set(inside)
        self._running += 1
        # Nothing waits here: what its steps wait is their models' time.
        run = inference.run = Run(inference.rows, inference.arrival_ns, inference.arrival_ns)
        try:
            answer = await self._run(inference)
        except BaseException as error:
            self._statistics.failed(inference, _reason(error))
            raise
        else:
            run.ran_ns = run.settled_ns = perf_counter_ns()
            self._statistics.succeeded(run, [inference])
            return answer
        finally:
            _entered.reset(token)
            self._leave()

    async def stream(self, inference: Inference) -> AsyncGenerator[list[Array]]:
        """The one answer."""
        yield await self.infer(inference)

    @property
    def pending(self) -> int:
        """None: requests wait in the queues of its models."""
        return 0

    async def close(self) -> None:
        """Finishes what runs and takes nothing new. Its models are others'."""
        self._draining = True
        if self._running:
            await self._drained.wait()

    def _leave(self) -> None:
        self._running -= 1
        if self._draining and not self._running:
            self._drained.set()

    async def _run(self, inference: Inference) -> list[Array]:
        tensors = dict(inference.inputs)
        needed = self._graph.needed(inference.outputs)
        waiting = [step for step in self._graph.steps if step.title in needed]
        # An optional input that did not come is nobody's to wait for.
        missing = {name for outputs in needed.values() for name in outputs.values()}
        started: list[asyncio.Task[dict[str, Array]]] = []
        running: set[asyncio.Task[dict[str, Array]]] = set()
        try:
            while waiting or running:
                ready = [step for step in waiting if missing.isdisjoint(step.inputs.values())]
                waiting = [step for step in waiting if step not in ready]
                works = [self._run_step(step, needed[step.title], tensors, inference) for step in ready]
                if len(works) == 1 and not running:
                    # A chain of models needs no tasks.
                    made = [await works[0]]
                else:
                    new = [asyncio.create_task(work) for work in works]
                    started.extend(new)
                    running.update(new)
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    made = [task.result() for task in done]
                for some in made:
                    tensors |= some
                    missing -= some.keys()
        finally:
            for task in started:
                task.cancel()
            # Whatever else went wrong, the request has the error that came first.
            await asyncio.gather(*started, return_exceptions=True)
        return [tensors[name] for name in inference.outputs]

    async def _run_step(
        self, step: Step, outputs: Mapping[str, str], tensors: Mapping[str, Array], inference: Inference
    ) -> dict[str, Array]:
        """The ensemble's tensors that a step makes."""
        member = self._member(step)
        # The model may have been replaced since it was checked.
        self._graph.check_names(step, member.signature)
        inputs = {name: tensors[taken] for name, taken in step.inputs.items() if taken in tensors}
        timeout_us = inference.timeout_us
        if timeout_us:
            timeout_us -= (perf_counter_ns() - inference.arrival_ns) // 1000
            if timeout_us <= 0:
                raise DeadlineError(f"{self._title}: the request's timeout passed before {step.title}.")
        answers = await member.infer(
            Inference(
                inputs,
                tuple(outputs),
                self._rows(step, member, inputs),
                priority=inference.priority,
                timeout_us=timeout_us,
                sequence=inference.sequence,
                parameters=inference.parameters,
            )
        )
        return dict(zip(outputs.values(), answers, strict=True))

    def _member(self, step: Step) -> Member:
        try:
            return self._lookup(step.model, step.version)
        except NotFoundError as error:
            # To the caller, whose model is the ensemble, nothing is unknown.
            raise NotReadyError(f"{self._title}: {step.title} is not served now. {error.message}") from error

    def _rows(self, step: Step, member: Member, inputs: Mapping[str, Array]) -> int:
        """How many rows the inputs have, after a look at what only their sizes can tell."""
        signature = member.signature
        sizes: dict[int | str, int] = {}
        for name, array in inputs.items():
            tensor = signature.inputs[name]
            fits = array.dtype == tensor.datatype.dtype and len(array.shape) == len(tensor.shape)
            if not fits or any(
                sizes.setdefault(axis, axis if isinstance(axis, int) else size) != size
                for axis, size in zip(tensor.shape, array.shape, strict=True)
            ):
                raise PenstockError(
                    f"{self._title}: {step.title} takes tensor {step.inputs[name]!r} as '{tensor}', with axes of one "
                    f"name equally long; it is {array.dtype} {list(array.shape)}."
                )
        if not signature.batched:
            return 1
        rows: int = next(iter(inputs.values())).shape[0]
        if rows > member.config.max_batch_size:
            raise PenstockError(
                f"{self._title}: {step.title} takes {member.config.max_batch_size} rows at most; it was given {rows}."
            )
        return rows


def _reason(error: BaseException) -> str:
    if isinstance(error, asyncio.CancelledError):
        return "CANCELED"
    if isinstance(error, NotReadyError | DeadlineError):
        return "REJECTED"
    return "OTHER" if isinstance(error, InvalidFieldError) else "BACKEND"
