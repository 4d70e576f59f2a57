"""The multilayer perceptron in Keras: built, trained, stopped and taken up again."""

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import keras
import numpy as np
from numpy.typing import NDArray

from penstock.api.training.v1.job_pb2 import Activation, EpochMetrics, MlpSpec
from penstock.training.families.interface import DivergedError, Observer
from penstock.training.families.mlp_spec import batch_size, epochs, learning_rate

if TYPE_CHECKING:
    from penstock.training.families.mlp import Rows

_ACTIVATIONS = {
    Activation.ACTIVATION_UNSPECIFIED: "relu",
    Activation.ACTIVATION_RELU: "relu",
    Activation.ACTIVATION_TANH: "tanh",
    Activation.ACTIVATION_SIGMOID: "sigmoid",
}
_MEASURE_BATCH = 1024


class Training:
    """A model with everything that its training has come to."""

    def __init__(self, spec: MlpSpec, seed: int, feature_count: int, class_count: int, tag: str) -> None:
        """`class_count` is 0 for a regressor."""
        keras.utils.set_random_seed(seed)
        self._spec = spec
        self._seed = seed
        self._shape = feature_count, class_count
        self._tag = tag
        self._model = self._new_model(spec.dropout)
        self._finished_epochs = 0
        self._best_loss = math.inf
        self._best_weights: list[NDArray[Any]] = []
        self._epochs_since_best = 0

    def fit(self, train: "Rows", validation: "Rows", observer: Observer) -> None:
        """Trains from where it stands to the end. Raises `DivergedError`, or what the observer raises."""
        if self._out_of_patience():
            return
        self._model.fit(
            train.features,
            train.targets,
            batch_size=batch_size(self._spec),
            epochs=epochs(self._spec),
            initial_epoch=self._finished_epochs,
            validation_data=(validation.features, validation.targets) if len(validation) else None,
            validation_batch_size=_MEASURE_BATCH,
            callbacks=[_Reports(self, observer, math.ceil(len(train) / batch_size(self._spec)))],
            verbose=0,
        )

    def end_epoch(self, values: dict[str, float]) -> None:
        """Takes note of a finished epoch. Raises `DivergedError`."""
        self._finished_epochs += 1
        if not all(map(math.isfinite, values.values())):
            raise DivergedError(
                f"The loss was {values['loss']} in epoch {self._finished_epochs}. Try a smaller learning rate than "
                f"{learning_rate(self._spec):g}, or standardize the features."
            )
        if not self._spec.patience:
            return
        if values["val_loss"] < self._best_loss:
            self._best_loss, self._best_weights = values["val_loss"], self._model.get_weights()
            self._epochs_since_best = 0
        else:
            self._epochs_since_best += 1
        self._model.stop_training = self._out_of_patience()

    def metrics(self, values: dict[str, float], duration_s: float) -> EpochMetrics:
        metrics = EpochMetrics(epoch=self._finished_epochs, epoch_count=epochs(self._spec), values=values)
        metrics.duration.FromMicroseconds(int(duration_s * 1e6))
        return metrics

    def weights(self) -> list[NDArray[Any]]:
        """The weights that the training ends with: a kernel and a bias for each layer, from input to output."""
        return list(self._best_weights) if self._spec.patience else list(self._model.get_weights())

    def finished(self, weights: Sequence[NDArray[Any]]) -> Any:  # noqa: ANN401  # Keras publishes no types
        """A model with given weights that does nothing at random."""
        model = self._new_model(dropout=0)
        model.set_weights(weights)
        return model

    def measure(self, model: Any, rows: "Rows") -> dict[str, float]:  # noqa: ANN401  # as above
        """Loss and metric of a model on some rows."""
        measured = model.evaluate(rows.features, rows.targets, batch_size=_MEASURE_BATCH, verbose=0, return_dict=True)
        return {name: float(value) for name, value in measured.items()}

    def write_state(self, path: Path) -> None:
        """Writes all that `restore` needs, as NumPy arrays without any pickled object."""
        about = {
            "tag": self._tag,
            "finished_epochs": self._finished_epochs,
            "best_loss": self._best_loss if self._best_weights else None,
            "epochs_since_best": self._epochs_since_best,
        }
        arrays = {"about": np.frombuffer(json.dumps(about).encode(), np.uint8)}
        for name, values in (
            ("weights", self._model.get_weights()),
            ("optimizer", [np.asarray(variable) for variable in self._model.optimizer.variables]),
            ("best", self._best_weights),
        ):
            arrays.update({f"{name}_{place}": value for place, value in enumerate(values)})
        with path.open("wb") as file:
            np.savez(file, **arrays)  # type: ignore[arg-type]  # its own keyword allow_pickle is not among the names

    def restore(self, path: Path) -> None:
        """Takes a training up where `write_state` left it."""
        with np.load(path, allow_pickle=False) as arrays:
            about = json.loads(arrays["about"].tobytes())

            def stored(name: str) -> list[NDArray[Any]]:
                count = sum(key.startswith(f"{name}_") for key in arrays.files)
                return [arrays[f"{name}_{place}"] for place in range(count)]

            self._model.set_weights(stored("weights"))
            self._model.optimizer.build(self._model.trainable_variables)
            for variable, value in zip(self._model.optimizer.variables, stored("optimizer"), strict=True):
                variable.assign(value)
            self._best_weights = stored("best")
        self._finished_epochs = about["finished_epochs"]
        self._best_loss = math.inf if about["best_loss"] is None else about["best_loss"]
        self._epochs_since_best = about["epochs_since_best"]
        # Not the order of rows that the first epochs had.
        keras.utils.set_random_seed((self._seed + self._finished_epochs) % 2**32)

    def fraction(self, epoch_fraction: float) -> float:
        """How much of all epochs is done."""
        return min((self._finished_epochs + epoch_fraction) / epochs(self._spec), 1.0)

    def _out_of_patience(self) -> bool:
        return bool(self._spec.patience) and self._epochs_since_best >= self._spec.patience

    def _new_model(self, dropout: float) -> Any:  # noqa: ANN401  # as above
        feature_count, class_count = self._shape
        features = keras.Input((feature_count,), dtype="float32", name="features")
        values = features
        for number, units in enumerate(self._spec.hidden_units, 1):
            activation = _ACTIVATIONS[self._spec.activation]
            values = keras.layers.Dense(units, activation=activation, name=f"hidden_{number}")(values)
            if dropout:
                values = keras.layers.Dropout(dropout, name=f"dropout_{number}")(values)
        if class_count:
            output = keras.layers.Dense(class_count, activation="softmax", name="probabilities")(values)
            loss, metric = "sparse_categorical_crossentropy", "accuracy"
        else:
            output = keras.layers.Dense(1, name="prediction")(values)
            loss, metric = "mean_squared_error", "mean_absolute_error"
        model = keras.Model(features, output, name="mlp")
        model.compile(keras.optimizers.Adam(learning_rate(self._spec)), loss=loss, metrics=[metric])
        return model


class _Reports(keras.callbacks.Callback):  # type: ignore[misc]  # Keras publishes no types
    """Tells the observer what Keras tells."""

    def __init__(self, training: Training, observer: Observer, steps: int) -> None:
        super().__init__()
        self._training = training
        self._observer = observer
        self._steps = steps
        self._epoch_began = 0.0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:  # noqa: ANN401  # as above
        self._epoch_began = time.monotonic()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ANN401  # as above
        self._observer.raise_if_stopping()
        self._observer.progress(self._training.fraction((batch + 1) / self._steps))

    def on_test_batch_end(self, batch: int, logs: Any = None) -> None:  # noqa: ANN401  # as above
        self._observer.raise_if_stopping()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:  # noqa: ANN401  # as above
        values = {name: float(value) for name, value in (logs or {}).items()}
        self._training.end_epoch(values)
        metrics = self._training.metrics(values, time.monotonic() - self._epoch_began)
        self._observer.epoch_ended(metrics, self._training.write_state)
