"""What a fitted scikit-learn estimator takes: its columns and the values that it has seen there."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.pipeline import FeatureUnion, Pipeline

from penstock.converters.errors import UnsupportedModelError
from penstock.converters.source import TEXT, SourceTensor


@dataclass(frozen=True)
class InputColumn:
    """An input, and the values to draw from, a tuple for each of its columns; an empty one means any number.

    A document's `values` are words. `is_of_table` says that the estimator takes a table of such columns.
    """

    tensor: SourceTensor
    values: tuple[tuple[Any, ...], ...]
    is_document: bool = False
    is_of_table: bool = False

    def draw(self, random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
        if self.is_document:
            texts = [" ".join(random.choice(np.asarray(self.values[0], object), 5)) for _ in range(shape[0])]
            return np.asarray(texts, object).reshape(shape)
        rows = np.empty(shape, self.tensor.numpy_dtype)
        for index, values in enumerate(self.values):
            known = np.asarray(values, object)
            rows[:, index] = random.choice(known, shape[0]) if values else random.standard_normal(shape[0])
        return rows


def input_columns(estimator: Any) -> tuple[InputColumn, ...]:  # noqa: ANN401 scikit-learn publishes no types
    """The inputs of an estimator. Raises `UnsupportedModelError`."""
    first = _first(estimator)
    if isinstance(first, ColumnTransformer) and hasattr(first, "feature_names_in_"):
        return tuple(_table_columns(first))
    if vocabulary := getattr(first, "vocabulary_", None):
        tensor = SourceTensor("text", TEXT, (None, 1))
        return (InputColumn(tensor, (tuple(sorted(vocabulary)),), is_document=True),)
    width = getattr(first, "n_features_in_", None) or getattr(estimator, "n_features_in_", None)
    if width is None:
        raise UnsupportedModelError(f"{type(first).__qualname__} does not say how many features it takes.")
    values = _values(first, width)
    if any(isinstance(value, str) for column in values for value in column):
        return (InputColumn(SourceTensor("text", TEXT, (None, width)), values),)
    return (InputColumn(SourceTensor("features", "float32", (None, width)), values),)


def _first(estimator: Any) -> Any:  # noqa: ANN401 scikit-learn publishes no types
    """The step that sees the rows first."""
    if isinstance(estimator, Pipeline):
        return next((_first(step) for _, step in estimator.steps if step not in {None, "passthrough"}), estimator)
    if isinstance(estimator, FeatureUnion):
        return _first(estimator.transformer_list[0][1])
    if hasattr(estimator, "best_estimator_"):
        return _first(estimator.best_estimator_)
    return estimator


def _table_columns(transformer: Any) -> Iterator[InputColumn]:  # noqa: ANN401 scikit-learn publishes no types
    """A column for each of the table's. What a transformer drops is an input all the same: the table has it."""
    names = [str(name) for name in transformer.feature_names_in_]
    found: dict[str, InputColumn] = {}
    for _, fitted, columns in transformer.transformers_:
        first = _first(fitted)
        if isinstance(columns, str):
            vocabulary = tuple(sorted(getattr(first, "vocabulary_", ())))
            tensor = SourceTensor(columns, TEXT, (None, 1))
            found[columns] = InputColumn(tensor, (vocabulary,), is_document=bool(vocabulary), is_of_table=True)
            continue
        chosen = [column if isinstance(column, str) else names[column] for column in columns]
        for name, values in zip(chosen, _values(first, len(chosen)), strict=True):
            is_text = any(isinstance(value, str) for value in values)
            dtype = TEXT if is_text else "float32"
            found[name] = InputColumn(SourceTensor(name, dtype, (None, 1)), (values,), is_of_table=True)
    return iter([found[name] for name in names if name in found])


def _values(fitted: Any, width: int) -> tuple[tuple[Any, ...], ...]:  # noqa: ANN401 scikit-learn publishes no types
    """The categories of each column, or the text that an imputer puts there; empty for numbers."""
    if (categories := getattr(fitted, "categories_", None)) is not None:
        return tuple(tuple(column.tolist()) for column in categories)
    statistics = getattr(fitted, "statistics_", None)
    if statistics is not None and np.asarray(statistics).dtype == object:
        return tuple((value,) if isinstance(value, str) else () for value in statistics)
    return ((),) * width
