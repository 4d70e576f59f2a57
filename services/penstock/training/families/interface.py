"""What a worker asks of a model family.

A family is made for one job. Its methods are called in the order in which they stand here, all in one thread, and only
`build` and what follows may load a training library: a spec or data that do not fit are told before that.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from numpy.typing import NDArray

from penstock.api.dataset.v1.dataset_pb2 import Split
from penstock.api.training.v1.job_pb2 import EpochMetrics

# A column's values: int64 or float64 [rows], or text.
Column = NDArray[Any] | list[str]
Splits = Mapping["Split.ValueType", Mapping[str, Column]]


class SpecError(Exception):
    """The spec does not fit the data, or describes no model that can be built."""


class DivergedError(Exception):
    """The loss became infinite or not a number."""


class StoppedError(Exception):
    """The job is being cancelled."""

    def __init__(self) -> None:
        super().__init__("The job was cancelled.")


class Observer(Protocol):
    """Whom a family tells how its training goes. Never waits for the network."""

    def raise_if_stopping(self) -> None:
        """Raises `StoppedError` if the job is being cancelled."""

    def progress(self, fraction: float) -> None:
        """How much of the training is done, 0 to 1."""

    def epoch_ended(self, metrics: EpochMetrics, write_state: Callable[[Path], None]) -> None:
        """An epoch has ended; `write_state` writes a file that `Family.build` can take up, and may not be called."""


@dataclass(frozen=True)
class Export:
    """A finished model: the live one, its file, rows for the parity check by input name, and the classes' names."""

    model: Any
    source: Path
    samples: Mapping[str, NDArray[Any]]
    labels: Sequence[str]


class Family(Protocol):
    """One job's training."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns to read."""

    def prepare(self, splits: Splits) -> None:
        """Takes the data. Raises `SpecError`."""

    def build(self, state: Path | None) -> None:
        """Builds the model, or takes a training up where a state was written."""

    def fit(self, observer: Observer) -> None:
        """Trains to the end. Raises `DivergedError`, or what the observer raises."""

    def evaluate(self) -> Mapping[str, float]:
        """The finished model on the test split, by metric; empty if that has no rows. Raises `DivergedError`."""

    def export(self, folder: Path) -> Export:
        """Writes the finished model into a folder."""
