"""The perceptron: what it refuses before Keras is loaded, its scaling, its patience, and going on from a state."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from penstock.api.dataset.v1.dataset_pb2 import Column, ColumnType, Dataset, Split
from penstock.api.training.v1.job_pb2 import EpochMetrics, JobSpec, MlpTask
from penstock.training.families.interface import DivergedError, SpecError, StoppedError
from penstock.training.families.mlp import Mlp, Scaling

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy:DeprecationWarning")

CLASSIFICATION = {"task": MlpTask.MLP_TASK_CLASSIFICATION, "label_column": "label"}
REGRESSION = {"task": MlpTask.MLP_TASK_REGRESSION, "label_column": "label"}
DATASET = Dataset(
    columns=[
        Column(name="x", type=ColumnType.COLUMN_TYPE_FLOAT64),
        Column(name="y", type=ColumnType.COLUMN_TYPE_FLOAT64),
        Column(name="label", type=ColumnType.COLUMN_TYPE_INT64),
    ]
)


class Listener:
    """Hears of every epoch; keeps the state of one, and may then stop the training."""

    def __init__(self, state: Path | None = None, keep_epoch: int = 0) -> None:
        self.epochs: list[EpochMetrics] = []
        self.fractions: list[float] = []
        self._state = state
        self._keep_epoch = keep_epoch

    def raise_if_stopping(self) -> None:
        if self._keep_epoch and len(self.epochs) == self._keep_epoch:
            raise StoppedError

    def progress(self, fraction: float) -> None:
        self.fractions.append(fraction)

    def epoch_ended(self, metrics: EpochMetrics, write_state: Callable[[Path], None]) -> None:
        self.epochs.append(metrics)
        if self._state and metrics.epoch == self._keep_epoch:
            write_state(self._state)


def splits(label: Callable[[Any, Any], Any], train: int = 64, validation: int = 32, test: int = 32) -> dict[int, Any]:
    """Rows on a grid far from 0, labelled by a function of x and y."""
    draw = np.random.default_rng(5)
    made = {}
    for split, count in (
        (Split.SPLIT_TRAIN, train),
        (Split.SPLIT_VALIDATION, validation),
        (Split.SPLIT_TEST, test),
    ):
        x, y = draw.uniform(50, 60, count), draw.uniform(-0.5, 0.5, count)
        made[split] = {"x": x, "y": y, "label": label(x, y)}
    return made


def prepared(rows: dict[int, Any], **mlp: Any) -> Mlp:
    family = Mlp(JobSpec(mlp=mlp, seed=1), DATASET, "a job")
    family.prepare(rows)
    return family


def two_halves(x: Any, y: Any) -> Any:
    return (x - 55 + 4 * y > 0).astype(np.int64)


@given(
    arrays.arrays(np.float32, (20, 3), elements=st.floats(-1000, 1000, width=32)),
    arrays.arrays(np.float32, (3, 2), elements=st.floats(-3, 3, width=32)),
)
def test_a_folded_layer_does_to_features_what_scaling_and_the_layer_did(features: Any, kernel: Any) -> None:
    scaling = Scaling.over(features)
    bias = np.array([0.5, -0.25], np.float32)
    folded_kernel, folded_bias = scaling.folded(kernel, bias)

    expected = ((features - scaling.mean) / scaling.deviation) @ kernel.astype(np.float64) + bias
    found = features.astype(np.float64) @ folded_kernel.astype(np.float64) + folded_bias
    # What float32 weights lose, they lose in proportion to the terms that are added up.
    scale = 1 + np.abs(features).astype(np.float64) @ np.abs(folded_kernel).astype(np.float64) + np.abs(folded_bias)
    assert np.all(np.abs(found - expected) <= 1e-6 * scale)


def test_a_constant_feature_is_only_shifted() -> None:
    scaling = Scaling.over(np.array([[7, 1], [7, 3]], np.float32))

    assert scaling.apply(np.array([[7, 1], [8, 3]], np.float32)).tolist() == [[0, -1], [1, 1]]


def test_data_that_do_not_fit_are_refused_with_the_column() -> None:
    rows = splits(two_halves)
    rows[Split.SPLIT_TEST]["x"] = rows[Split.SPLIT_TEST]["x"] * 1e40
    with pytest.raises(SpecError, match=r"'x' has a value of magnitude .*e\+41 in the test split"):
        prepared(rows, **CLASSIFICATION)

    rows = splits(two_halves)
    rows[Split.SPLIT_VALIDATION]["label"] = rows[Split.SPLIT_VALIDATION]["label"] + 5
    with pytest.raises(SpecError, match="'label' has 5 in the validation split but never in the training split"):
        prepared(rows, **CLASSIFICATION)

    with pytest.raises(SpecError, match="must have 2 classes or more in the training split; it has 1"):
        prepared(splits(lambda x, _: np.zeros(len(x), np.int64)), **CLASSIFICATION)


def test_a_classifier_learns_on_scaled_features_and_takes_them_as_they_are(tmp_path: Path) -> None:
    family = prepared(
        splits(two_halves), **CLASSIFICATION, hidden_units=[16], epochs=40, learning_rate=0.02, standardize=True
    )
    listener = Listener()
    family.build(None)
    family.fit(listener)
    export = family.export(tmp_path)

    assert family.evaluate()["accuracy"] >= 0.9
    assert list(export.labels) == ["0", "1"]
    answers = np.asarray(export.model(export.samples["features"]))
    assert answers.shape == (32, 2)
    assert np.mean((answers[:, 1] > 0.5) == two_halves(*export.samples["features"].T)) >= 0.9
    assert (export.model.inputs[0].name, export.model.layers[-1].name) == ("features", "probabilities")
    assert export.source.exists()
    assert listener.fractions == sorted(listener.fractions)
    assert listener.fractions[-1] == 1


def test_a_training_goes_on_from_its_state(tmp_path: Path) -> None:
    fields = {**CLASSIFICATION, "hidden_units": [8], "epochs": 6, "patience": 6, "dropout": 0.2, "standardize": True}
    rows = splits(two_halves)
    first = prepared(rows, **fields)
    first.build(None)
    with pytest.raises(StoppedError):
        first.fit(Listener(tmp_path / "state", keep_epoch=3))
    second = prepared(rows, **fields)
    second.build(tmp_path / "state")
    restored, stopped = second._built(), first._built()
    # The first one was stopped within its fourth epoch: only what an epoch's end changes is still the same.
    assert restored._best_loss == stopped._best_loss
    assert all(map(np.array_equal, restored._best_weights, stopped._best_weights))
    assert int(restored._model.optimizer.iterations) == 3 * 2
    momenta = [np.asarray(variable) for variable in restored._model.optimizer.variables[2:]]
    assert any(np.any(momentum != 0) for momentum in momenta)

    listener = Listener()
    second.fit(listener)

    assert [metrics.epoch for metrics in listener.epochs] == [4, 5, 6]
    assert restored._best_loss <= stopped._best_loss


def test_patience_ends_the_training_with_the_weights_of_the_best_epoch(tmp_path: Path) -> None:
    rows = splits(two_halves)
    # What is learned on the training split is wrong here, so that the loss grows from the first epoch on.
    rows[Split.SPLIT_VALIDATION]["label"] = 1 - rows[Split.SPLIT_VALIDATION]["label"]
    family = prepared(rows, **CLASSIFICATION, epochs=50, patience=3, learning_rate=0.05, standardize=True)
    listener = Listener()
    family.build(None)
    family.fit(listener)

    losses = [metrics.values["val_loss"] for metrics in listener.epochs]
    assert len(losses) == losses.index(min(losses)) + 1 + 3 < 50
    validation = family._rows[Split.SPLIT_VALIDATION]
    measured = family._built().measure(family._finished, validation)
    assert measured["loss"] == pytest.approx(min(losses), rel=1e-4)


def test_a_regressor_learns_a_line_and_says_when_it_diverges() -> None:
    rows = splits(lambda x, y: 3 * (x - 55) + 10 * y, validation=0, test=0)
    family = prepared(rows, **REGRESSION, epochs=100, learning_rate=0.3, standardize=True, batch_size=64)
    listener = Listener()
    family.build(None)
    family.fit(listener)

    assert set(listener.epochs[0].values) == {"loss", "mean_absolute_error"}
    assert listener.epochs[-1].values["loss"] < listener.epochs[0].values["loss"] / 10
    assert family.evaluate() == {}
    assert np.asarray(family._finished(np.array([[55, 0]], np.float32))).shape == (1, 1)

    rows = splits(lambda x, _: x * 1e30, validation=0)
    family = prepared(rows, **REGRESSION, epochs=3, learning_rate=1)
    family.build(None)
    with pytest.raises(DivergedError, match=r"The loss was inf in epoch 1\. Try a smaller learning rate than 1"):
        family.fit(Listener())
