"""Checks of a job's spec: what every field may be, and whether it fits the dataset's columns."""

from collections.abc import Iterator

from penstock.api.dataset.v1.dataset_pb2 import ColumnType, Dataset
from penstock.api.training.v1.job_pb2 import Activation, JobSpec, MlpSpec, MlpTask
from penstock.rpc.validation import Violations
from penstock.training.families.mlp_spec import (
    CLASS_TYPES,
    MAX_CLASSES,
    MAX_PARAMETERS,
    NUMERIC_TYPES,
    feature_columns,
    parameter_count,
)

MAX_ATTEMPTS = 10
DEFAULT_ATTEMPTS = 3


def attempts_allowed(spec: JobSpec) -> int:
    """How many attempts a job may fail before it fails itself."""
    return spec.max_attempts or DEFAULT_ATTEMPTS


def check_spec(violations: Violations, spec: JobSpec) -> None:
    """Checks what needs no dataset."""
    violations.name("spec.dataset", spec.dataset)
    violations.name("spec.registration.model", spec.registration.model)
    violations.text("spec.registration.description", spec.registration.description)
    if alias := spec.registration.alias:
        violations.name("spec.registration.alias", alias)
        violations.require(
            not alias.isdigit(), "spec.registration.alias", f"expected a name, not a number; got {alias!r}"
        )
    violations.within("spec.max_attempts", spec.max_attempts, 0, MAX_ATTEMPTS)
    if spec.WhichOneof("family") == "mlp":
        _check_mlp(violations, spec.mlp)
    else:
        violations.add("spec.mlp", "expected a model family; got none")


def check_columns(violations: Violations, spec: JobSpec, dataset: Dataset) -> None:
    """Checks that the columns are there and have the right types."""
    types = {column.name: column.type for column in dataset.columns}
    mlp = spec.mlp
    allowed = CLASS_TYPES if mlp.task == MlpTask.MLP_TASK_CLASSIFICATION else NUMERIC_TYPES
    if mlp.label_column not in types:
        violations.add("spec.mlp.label_column", f"expected a column of {spec.dataset!r}; got {mlp.label_column!r}")
    elif types[mlp.label_column] not in allowed:
        violations.add(
            "spec.mlp.label_column",
            f"expected a column of type {_names(allowed)}; {_described(mlp.label_column, types)}",
        )
    for field, name in _features(mlp, dataset):
        if name not in types:
            violations.add(field, f"expected a column of {spec.dataset!r}; got {name!r}")
        elif types[name] not in NUMERIC_TYPES:
            remedy = "" if mlp.feature_columns else "; name the feature columns, and leave this one out"
            violations.add(
                field, f"expected a column of type {_names(NUMERIC_TYPES)}; {_described(name, types)}{remedy}"
            )
    violations.require(
        bool(feature_columns(mlp, dataset)), "spec.mlp.feature_columns", "expected at least one column beside the label"
    )
    counts = dataset.split_counts
    violations.require(counts.train > 0, "spec.dataset", "expected rows in the training split; it has none")
    violations.require(
        not mlp.patience or counts.validation > 0,
        "spec.mlp.patience",
        "expected 0, or a dataset with rows in its validation split: patience watches the loss there",
    )


def check_classes(violations: Violations, spec: JobSpec, dataset: Dataset, class_count: int) -> None:
    """Checks what depends on the number of classes, which is 0 for a regressor."""
    if spec.mlp.task == MlpTask.MLP_TASK_CLASSIFICATION:
        violations.require(
            2 <= class_count <= MAX_CLASSES,
            "spec.mlp.label_column",
            f"expected 2 to {MAX_CLASSES:,} distinct values in the training split; got "
            + (f"{class_count}" if class_count <= MAX_CLASSES else "more"),
        )
    parameters = parameter_count(spec.mlp, len(feature_columns(spec.mlp, dataset)), max(class_count, 1))
    violations.require(
        parameters <= MAX_PARAMETERS,
        "spec.mlp.hidden_units",
        f"expected a model of at most {MAX_PARAMETERS:,} parameters, which one ONNX file can hold; this one has "
        f"{parameters:,}",
    )


def _check_mlp(violations: Violations, mlp: MlpSpec) -> None:
    violations.require(
        mlp.task != MlpTask.MLP_TASK_UNSPECIFIED and mlp.task in MlpTask.values(),
        "spec.mlp.task",
        f"expected MLP_TASK_CLASSIFICATION or MLP_TASK_REGRESSION; got {mlp.task}",
    )
    violations.require(bool(mlp.label_column), "spec.mlp.label_column", "expected the name of a column; got nothing")
    seen: set[str] = set()
    for index, name in enumerate(mlp.feature_columns):
        field = f"spec.mlp.feature_columns[{index}]"
        violations.require(name != mlp.label_column, field, f"{name!r} is the label column")
        violations.require(name not in seen, field, f"{name!r} is there already")
        seen.add(name)
    violations.within("spec.mlp.hidden_units", len(mlp.hidden_units), 0, 32)
    for index, units in enumerate(mlp.hidden_units):
        violations.within(f"spec.mlp.hidden_units[{index}]", units, 1, 16_384)
    violations.require(
        mlp.activation in Activation.values(), "spec.mlp.activation", f"expected an activation; got {mlp.activation}"
    )
    violations.require(
        0 <= mlp.dropout < 1, "spec.mlp.dropout", f"expected at least 0 and less than 1; got {mlp.dropout}"
    )
    violations.within("spec.mlp.learning_rate", mlp.learning_rate, 0, 1)
    violations.within("spec.mlp.batch_size", mlp.batch_size, 0, 65_536)
    violations.within("spec.mlp.epochs", mlp.epochs, 0, 10_000)
    violations.require(mlp.patience >= 0, "spec.mlp.patience", f"expected 0 or more; got {mlp.patience}")


def _features(mlp: MlpSpec, dataset: Dataset) -> Iterator[tuple[str, str]]:
    """Each feature column with the path of the field that asks for it."""
    for index, name in enumerate(feature_columns(mlp, dataset)):
        yield (f"spec.mlp.feature_columns[{index}]" if mlp.feature_columns else "spec.mlp.feature_columns"), name


def _names(types: frozenset["ColumnType.ValueType"]) -> str:
    return " or ".join(ColumnType.Name(each).removeprefix("COLUMN_TYPE_") for each in sorted(types))


def _described(name: str, types: dict[str, "ColumnType.ValueType"]) -> str:
    return f"{name!r} is {ColumnType.Name(types[name]).removeprefix('COLUMN_TYPE_')}"
