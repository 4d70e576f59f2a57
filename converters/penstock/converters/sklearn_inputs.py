"""What a fitted scikit-learn estimator takes: its columns and the values that it has seen there."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.compose import ColumnTransformer
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.pipeline import FeatureUnion, Pipeline

from penstock.converters.errors import UnsupportedModelError
from penstock.converters.sklearn_domain import Domain, domain_of
from penstock.converters.sklearn_steps import seeing
from penstock.converters.sklearn_text import draw_document, words_of
from penstock.converters.source import TEXT, SourceTensor

Values = tuple[Any, ...]
"""What a column may hold; nothing means any number."""


@dataclass(frozen=True)
class InputColumn:
    """An input, and for each of its columns what to draw: one of its values, or a number near where they lay.

    A document's `values` are words. `is_of_table` says that the estimator takes a table of such columns.
    """

    tensor: SourceTensor
    values: tuple[Values, ...]
    domain: Domain | None = None
    is_document: bool = False
    is_of_table: bool = False

    def draw(self, random: np.random.Generator, shape: tuple[int, ...]) -> NDArray[Any]:
        if self.is_document:
            texts = [draw_document(random, self.values[0]) for _ in range(shape[0])]
            return np.asarray(texts, object).reshape(shape)
        centre, spread = self.domain or (np.zeros(shape[1]), np.ones(shape[1]))
        rows = np.empty(shape, self.tensor.numpy_dtype)
        for index, values in enumerate(self.values):
            known = np.asarray(values, object)
            numbers = centre[index] + spread[index] * random.standard_normal(shape[0])
            rows[:, index] = random.choice(known, shape[0]) if values else numbers
        return rows


def input_columns(estimator: Any) -> tuple[InputColumn, ...]:  # noqa: ANN401 scikit-learn publishes no types
    """The inputs of an estimator. Raises `UnsupportedModelError`."""
    first = _first(estimator)
    if isinstance(first, ColumnTransformer) and hasattr(first, "feature_names_in_"):
        return tuple(_table_columns(first))
    if any(isinstance(step, ColumnTransformer) and hasattr(step, "feature_names_in_") for step in seeing(first)):
        raise UnsupportedModelError(
            f"{type(first).__qualname__} holds a ColumnTransformer that takes a table, and so takes one itself: only "
            "pipelines do in ONNX. Put one ColumnTransformer before it: make_pipeline(columns, ensemble)."
        )
    if isinstance(first, CountVectorizer):
        return (InputColumn(SourceTensor("text", TEXT, (None, 1)), (words_of(first),), is_document=True),)
    width = getattr(first, "n_features_in_", None) or getattr(estimator, "n_features_in_", None)
    if width is None:
        raise UnsupportedModelError(
            f"{type(first).__qualname__} does not say how many features it takes, which an ONNX input has to. Replace "
            "it by an estimator with n_features_in_; a HashingVectorizer by a CountVectorizer."
        )
    values = _values(estimator, width)
    dtype = _dtype(values, type(first).__qualname__)
    name = "text" if dtype == TEXT else "features"
    return (InputColumn(SourceTensor(name, dtype, (None, width)), values, domain_of(estimator, width)),)


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
        if isinstance(columns, str):
            found[columns] = _document_column(columns, _first(fitted))
            continue
        chosen = np.asarray(names, object)[columns if _are_positions(columns) else [names.index(c) for c in columns]]
        centre, spread = domain_of(fitted, len(chosen))
        for index, (name, values) in enumerate(zip(chosen, _values(fitted, len(chosen)), strict=True)):
            if name in found and not values:
                continue  # an earlier transformer knows more of it
            tensor = SourceTensor(name, _dtype((values,), name), (None, 1))
            domain = (centre[index : index + 1], spread[index : index + 1])
            found[name] = InputColumn(tensor, (values,), domain, is_of_table=True)
    return iter([found[name] for name in names if name in found])


def _are_positions(columns: Any) -> bool:  # noqa: ANN401 names, positions, a mask or a slice
    return isinstance(columns, slice) or np.asarray(columns).dtype.kind in "biu"


def _document_column(name: str, first: Any) -> InputColumn:  # noqa: ANN401 scikit-learn publishes no types
    words = words_of(first) if isinstance(first, CountVectorizer) else ()
    return InputColumn(SourceTensor(name, TEXT, (None, 1)), (words,), is_document=bool(words), is_of_table=True)


def _values(estimator: Any, width: int) -> tuple[Values, ...]:  # noqa: ANN401 scikit-learn publishes no types
    """The categories of each column, or the text that an imputer puts there; empty for numbers."""
    for step in seeing(estimator):
        categories = getattr(step, "categories_", None)
        if categories is not None and len(categories) == width:
            return tuple(tuple(column.tolist()) for column in categories)
        statistics = getattr(step, "statistics_", None)
        if statistics is not None and np.asarray(statistics).dtype == object:
            return tuple((value,) if isinstance(value, str) else () for value in statistics)
    return ((),) * width


def _dtype(columns: Sequence[Values], name: str) -> str:
    """Integers are taken as such: float32 holds them only to 2**24. Raises `UnsupportedModelError`."""
    values = [value for column in columns for value in column]
    texts = sum(isinstance(value, str) for value in values)
    if texts and texts == len(values):
        return TEXT
    if texts:
        raise UnsupportedModelError(
            f"{name!r} has categories that are no texts beside texts: "
            f"{[value for value in values if not isinstance(value, str)][:3]}. A text input holds nothing else: put a "
            "text in their place, with a SimpleImputer whose missing_values they are, and give numbers columns of "
            "their own in a table."
        )
    if values and all(columns) and all(isinstance(value, int) for value in values):
        return "int64"
    exact = all(value != value or float(np.float32(value)) == value for value in values)  # noqa: PLR0124 NaN
    return "float32" if exact else "float64"
