"""What the scheduler of sequences keeps: steps, their sequences, and the instances that hold those."""

import asyncio
from collections import deque
from concurrent.futures import ThreadPoolExecutor

from penstock.inference.engine import Engine
from penstock.inference.inference import Inference, SequenceStep
from penstock.inference.sequence_config import SequenceConfig
from penstock.inference.sequence_run import SequenceRunner, States
from penstock.inference.tensors import Array


class Step:
    """One request, and who waits for its answer."""

    __slots__ = ("answer", "inference", "sequence", "step", "timer", "waits")

    def __init__(
        self, inference: Inference, step: SequenceStep, sequence: "LiveSequence", answer: "asyncio.Future[list[Array]]"
    ) -> None:
        self.inference = inference
        self.step = step
        self.sequence = sequence
        self.answer = answer
        self.waits = True
        self.timer: asyncio.TimerHandle | None = None


class LiveSequence:
    """A sequence from its first step until it ended. `states` is None before a START has succeeded."""

    __slots__ = ("id", "offered", "place", "rested_s", "running", "states", "steps", "worker")

    def __init__(self, sequence_id: int | str) -> None:
        self.id = sequence_id
        self.states: States | None = None
        self.steps: deque[Step] = deque()
        self.running: Step | None = None
        # The instance that holds it, and its row there; None while all instances are full.
        self.worker: Worker | None = None
        self.place = 0
        # Whether it stands in its worker's heap.
        self.offered = False
        self.rested_s = 0.0

    @property
    def ends(self) -> bool:
        """Whether the last step that is known of is its END."""
        last = next((one for one in reversed(self.steps) if not one.answer.done()), self.running)
        return last is not None and last.step.end


class Worker:
    """An instance: its thread, the sequences that it holds, and those of them that have a step to run, oldest first."""

    def __init__(self, engine: Engine, config: SequenceConfig) -> None:
        self.engine = engine
        self.runner = SequenceRunner(engine, config)
        self.thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="penstock-sequences")
        self.held = 0
        self.free_places: list[int] = list(range(config.seats or 0)) if config.fixed_rows else []
        self.ready: list[tuple[int, int, LiveSequence]] = []
        self.busy = False
        self.scheduled: asyncio.Handle | None = None
