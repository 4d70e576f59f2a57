"""What the parts of the inference service hand to one another: a request, its run, and who runs it."""

import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol

from penstock.inference.signature import Signature
from penstock.inference.tensors import Array
from penstock.rpc.errors import NotReadyError

if TYPE_CHECKING:
    from penstock.inference.statistics import Statistics
    from penstock.oip.model_config_pb2 import ModelConfig


class QueueFullError(NotReadyError):
    """As many requests wait as may. `title` names the version."""

    def __init__(self, title: str, waiting: int) -> None:
        super().__init__(
            f"{title} has {waiting} requests waiting, as many as max_queue_size allows. Send the request again after a "
            f"pause."
        )


Parameter = bool | int | str | float
_NONE: Mapping[str, Parameter] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class SequenceStep:
    """Which sequence a request belongs to, and where in it. Ids are numbers or texts; 0 and "" are none."""

    id: int | str
    start: bool
    end: bool


@dataclass(slots=True)
class Run:
    """When one run of a model went through its stages, `time.perf_counter_ns`; `rows` it had in all."""

    rows: int = 0
    start_ns: int = 0
    gathered_ns: int = 0
    ran_ns: int = 0
    settled_ns: int = 0


@dataclass(slots=True)
class Inference:
    """One request that agrees with its version's signature. `outputs` are the wanted ones, in the wanted order."""

    inputs: dict[str, Array]
    outputs: tuple[str, ...]
    rows: int
    # 0: the model's default level.
    priority: int = 0
    # Microseconds it may wait to be run; 0: no limit of its own.
    timeout_us: int = 0
    sequence: SequenceStep | None = None
    # The caller's own, as Python models see them.
    parameters: Mapping[str, Parameter] = field(default_factory=lambda: _NONE)
    arrival_ns: int = field(default_factory=time.perf_counter_ns)
    # The run that answered it; requests of one batch share one.
    run: Run | None = None


class Scheduler(Protocol):
    """Runs the requests of one loaded version. Lives on the event loop."""

    async def infer(self, inference: Inference) -> list[Array]:
        """The wanted outputs. A caller that is cancelled while its request waits is not run.

        Raises `QueueFullError`, `NotReadyError` if the queue drains, `DeadlineError` if the request waited too long,
        `UnimplementedError` for a decoupled model, and what the model raises.
        """

    def stream(self, inference: Inference) -> AsyncGenerator[list[Array]]:
        """The answers one by one: exactly one, or, from a decoupled model, any number. Raises as `infer`."""

    @property
    def pending(self) -> int:
        """Requests that wait."""

    async def close(self) -> None:
        """Finishes what is queued, takes nothing new, and gives the model's memory back."""


@dataclass(frozen=True)
class Loaded:
    """A version that can be served. `labels` are the class names of outputs that have some."""

    signature: Signature
    config: "ModelConfig"
    labels: Mapping[str, Sequence[str]]
    scheduler: Scheduler
    statistics: "Statistics"
