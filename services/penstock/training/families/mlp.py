"""The multilayer perceptron of the contract: its data, its scaling, and what becomes of it. Keras is in `keras_mlp`."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from penstock.api.dataset.v1.dataset_pb2 import Dataset, Split
from penstock.api.training.v1.job_pb2 import JobSpec, MlpTask
from penstock.training.families.interface import Column, DivergedError, Export, Observer, SpecError, Splits
from penstock.training.families.mlp_spec import feature_columns

if TYPE_CHECKING:
    from penstock.training.families.keras_mlp import Training

# Rows for the parity check: enough to meet the data's extremes, few enough to take no time.
SAMPLE_ROWS = 256

_SPLITS = {
    Split.SPLIT_TRAIN: "training",
    Split.SPLIT_VALIDATION: "validation",
    Split.SPLIT_TEST: "test",
}
_FLOAT32_MAX = float(np.finfo(np.float32).max)
# Folding divides weights by the deviation; under this one they could pass the end of FP32.
_LEAST_DEVIATION = 1e-30


@dataclass(frozen=True)
class Rows:
    """One split: features float32 [rows, features] as they are in the dataset, and targets [rows].

    Targets are int32 places among the classes, or float32 values for a regressor.
    """

    features: NDArray[np.float32]
    targets: NDArray[Any]

    def __len__(self) -> int:
        return len(self.targets)


@dataclass(frozen=True)
class Scaling:
    """Shift and scale of each feature, float64 [features]: (x − mean) / deviation."""

    mean: NDArray[np.float64]
    deviation: NDArray[np.float64]

    @classmethod
    def over(cls, features: NDArray[np.float32]) -> "Scaling":
        """The one that gives mean 0 and variance 1 over some rows; a constant feature is only shifted."""
        deviation = features.std(axis=0, dtype=np.float64)
        return cls(features.mean(axis=0, dtype=np.float64), np.where(deviation > _LEAST_DEVIATION, deviation, 1.0))

    def apply(self, features: NDArray[np.float32]) -> NDArray[np.float32]:
        return ((features - self.mean) / self.deviation).astype(np.float32)

    def folded(
        self, kernel: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Kernel [features, units] and bias [units] of a layer that does the same to features as they are."""
        scaled = kernel.astype(np.float64) / self.deviation[:, None]
        return scaled.astype(np.float32), (bias - self.mean @ scaled).astype(np.float32)


class Mlp:
    """A family of `penstock.training.families.interface`."""

    def __init__(self, spec: JobSpec, dataset: Dataset, state_tag: str) -> None:
        """`state_tag` is written into every state, so that no two jobs ever write the same one."""
        self._spec = spec.mlp
        self._seed = spec.seed
        self._state_tag = state_tag
        self._features = list(feature_columns(spec.mlp, dataset))
        self._rows: dict[Split.ValueType, Rows] = {}
        self._classes: list[int] | list[str] = []
        self._scaling: Scaling | None = None
        self._training: Training | None = None
        self._finished: Any = None

    @property
    def columns(self) -> Sequence[str]:
        return [*self._features, self._spec.label_column]

    def prepare(self, splits: Splits) -> None:
        if self._spec.task == MlpTask.MLP_TASK_CLASSIFICATION:
            self._classes = sorted(set(_values(splits[Split.SPLIT_TRAIN][self._spec.label_column])))
            if len(self._classes) < 2:
                raise SpecError(
                    f"Column {self._spec.label_column!r} must have 2 classes or more in the training split; it has "
                    f"{len(self._classes)}."
                )
        for split, columns in splits.items():
            features = [_as_float32(name, columns[name], split) for name in self._features]
            targets = self._targets(columns[self._spec.label_column], split)
            self._rows[split] = Rows(np.stack(features, axis=1), targets)
        if self._spec.standardize:
            self._scaling = Scaling.over(self._rows[Split.SPLIT_TRAIN].features)

    def build(self, state: Path | None) -> None:
        from penstock.training.families.keras_mlp import Training  # noqa: PLC0415  # seconds of TensorFlow

        self._training = Training(self._spec, self._seed, len(self._features), len(self._classes), self._state_tag)
        if state is not None:
            self._training.restore(state)

    def fit(self, observer: Observer) -> None:
        training = self._built()
        train, validation = self._rows[Split.SPLIT_TRAIN], self._rows[Split.SPLIT_VALIDATION]
        training.fit(self._scaled(train), self._scaled(validation), observer)
        weights = training.weights()
        if self._scaling is not None:
            weights[:2] = self._scaling.folded(weights[0], weights[1])
        self._finished = training.finished(weights)

    def evaluate(self) -> Mapping[str, float]:
        test = self._rows[Split.SPLIT_TEST]
        if not len(test):
            return {}
        measured = self._built().measure(self._finished, test)
        if not all(map(math.isfinite, measured.values())):
            raise DivergedError(f"The loss on the test split is {measured['loss']}. Look for rows far from the others.")
        return measured

    def export(self, folder: Path) -> Export:
        source = folder / "model.keras"
        self._finished.save(source)
        rows = self._rows[Split.SPLIT_TEST] if len(self._rows[Split.SPLIT_TEST]) else self._rows[Split.SPLIT_TRAIN]
        return Export(
            model=self._finished,
            source=source,
            samples={"features": rows.features[:SAMPLE_ROWS]},
            labels=[str(each) for each in self._classes],
        )

    def _built(self) -> "Training":
        if self._training is None:
            raise RuntimeError("build comes first")
        return self._training

    def _scaled(self, rows: Rows) -> Rows:
        return rows if self._scaling is None else Rows(self._scaling.apply(rows.features), rows.targets)

    def _targets(self, column: Column, split: "Split.ValueType") -> NDArray[Any]:
        if self._spec.task == MlpTask.MLP_TASK_REGRESSION:
            return _as_float32(self._spec.label_column, column, split)
        places = {value: place for place, value in enumerate(self._classes)}
        values = _values(column)
        if unknown := set(values) - set(places):
            raise SpecError(
                f"Column {self._spec.label_column!r} has {min(unknown)!r} in the {_SPLITS[split]} split but never in "
                f"the training split. Give the dataset another split seed, or more rows of that class."
            )
        return np.array([places[value] for value in values], np.int32)


def _values(column: Column) -> list[Any]:
    return column if isinstance(column, list) else column.tolist()


def _as_float32(name: str, column: Column, split: "Split.ValueType") -> NDArray[np.float32]:
    values = np.asarray(column, np.float64)
    if len(values) and (largest := np.abs(values).max()) > _FLOAT32_MAX:
        raise SpecError(
            f"Column {name!r} has a value of magnitude {largest:.3g} in the {_SPLITS[split]} split; the model computes "
            f"with FP32, which ends at {_FLOAT32_MAX:.3g}. Scale the column, or leave it out."
        )
    return values.astype(np.float32)
