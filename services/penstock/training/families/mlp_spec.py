"""What an MlpSpec means where it leaves something out. Needs no Keras, so the service's checks share it."""

from collections.abc import Sequence
from itertools import pairwise

from penstock.api.dataset.v1.dataset_pb2 import ColumnType, Dataset
from penstock.api.training.v1.job_pb2 import MlpSpec

MAX_CLASSES = 10_000
# An ONNX file without external data ends at 2 GiB: four bytes a parameter.
MAX_PARAMETERS = 500_000_000

NUMERIC_TYPES = frozenset({ColumnType.COLUMN_TYPE_INT64, ColumnType.COLUMN_TYPE_FLOAT64})
CLASS_TYPES = frozenset({ColumnType.COLUMN_TYPE_INT64, ColumnType.COLUMN_TYPE_STRING})


def feature_columns(mlp: MlpSpec, dataset: Dataset) -> Sequence[str]:
    """The columns to predict from, in the order of the model's input."""
    return list(mlp.feature_columns) or [column.name for column in dataset.columns if column.name != mlp.label_column]


def parameter_count(mlp: MlpSpec, feature_count: int, output_count: int) -> int:
    """How many weights and biases the model has."""
    return sum((inputs + 1) * outputs for inputs, outputs in pairwise([feature_count, *mlp.hidden_units, output_count]))


def epochs(mlp: MlpSpec) -> int:
    return mlp.epochs or 20


def batch_size(mlp: MlpSpec) -> int:
    return mlp.batch_size or 32


def learning_rate(mlp: MlpSpec) -> float:
    return mlp.learning_rate or 0.001
