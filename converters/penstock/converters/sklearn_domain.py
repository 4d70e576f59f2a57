"""Where the rows lay that an estimator was trained on, as far as what it has fitted says it.

Random rows are drawn there: around zero, a model of features far from zero answers the same to all of them, and what
float32 loses of large numbers does not show.
"""

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.converters.sklearn_boosters import splits_of
from penstock.converters.sklearn_steps import seeing
from penstock.converters.sklearn_trees import trees_of

Domain = tuple[NDArray[np.float64], NDArray[np.float64]]
"""The centre and the spread of each column."""


def domain_of(estimator: Any, width: int) -> Domain:  # noqa: ANN401 scikit-learn publishes no types
    """Zero and one where the estimator does not say it."""
    centre, spread = np.zeros(width), np.ones(width)
    for step in seeing(estimator):
        if hasattr(step, "transformers_") and not hasattr(step, "feature_names_in_"):
            for _, fitted, columns in step.transformers_:
                chosen = np.arange(width)[columns]
                centre[chosen], spread[chosen] = domain_of(fitted, len(chosen))
            break
        found = _said(step, width)
        if found is not None:
            centre, spread = found[0], np.where(found[1] > 0, found[1], 1.0)
            break
    return centre, spread


def _said(step: Any, width: int) -> NDArray[np.float64] | None:  # noqa: ANN401 scikit-learn publishes no types
    """The centres above the spreads."""
    say = next((say for attribute, say in _SAYS.items() if getattr(step, attribute, None) is not None), None)
    try:
        known = np.asarray(say(step) if say else _of_splits(step, width), np.float64)
    except (AttributeError, TypeError, ValueError):  # estimators of others mean another thing by the name
        return None
    return np.nan_to_num(known, posinf=0.0, neginf=0.0) if known.shape == (2, width) else None


def _of_rows(rows: Any) -> Domain:  # noqa: ANN401 an array, or a sparse one
    dense = np.asarray(rows.toarray() if hasattr(rows, "toarray") else rows, np.float64)
    with warnings.catch_warnings(action="ignore"):  # of columns that are nothing but NaN
        return np.nanmean(dense, axis=0), np.nanstd(dense, axis=0)


def _of_mean(step: Any) -> Domain | None:  # noqa: ANN401 scikit-learn publishes no types
    if getattr(step, "var_", None) is not None:
        return step.mean_, np.sqrt(step.var_)
    if not hasattr(step, "explained_variance_"):
        return None
    return step.mean_, np.sqrt(step.explained_variance_ @ np.square(step.components_))


def _of_statistics(step: Any) -> Domain | None:  # noqa: ANN401 scikit-learn publishes no types
    if np.asarray(step.statistics_).dtype.kind != "f":
        return None
    return step.statistics_, np.abs(step.statistics_) / 4


def _of_powers(step: Any) -> Domain:  # noqa: ANN401 scikit-learn publishes no types
    middle, upper = step.inverse_transform(np.stack([np.zeros_like(step.lambdas_), np.ones_like(step.lambdas_)]))
    return middle, np.abs(upper - middle)


def _of_splits(step: Any, width: int) -> Domain | None:  # noqa: ANN401 scikit-learn publishes no types
    trees, others = trees_of(step), splits_of(step)
    features = [tree.feature[tree.is_split] for tree in trees] + [
        np.array([feature for feature, _ in others], np.int64)
    ]
    thresholds = [tree.threshold[tree.is_split] for tree in trees] + [np.array([value for _, value in others])]
    return _by_column(np.concatenate(features).astype(np.int64), np.concatenate(thresholds), width)


def _by_column(features: NDArray[np.int64], thresholds: NDArray[np.float64], width: int) -> Domain | None:
    known = np.isfinite(thresholds) & (features < width)
    features, thresholds = features[known], thresholds[known]
    if not len(features):
        return None
    counts = np.maximum(np.bincount(features, minlength=width), 1)
    centre = np.bincount(features, thresholds, minlength=width) / counts
    spread = np.sqrt(np.bincount(features, np.square(thresholds - centre[features]), minlength=width) / counts)
    return centre, np.where(spread > 0, spread, np.abs(centre) / 4)


_SAYS: dict[str, Callable[[Any], Domain | None]] = {
    "theta_": lambda step: (step.theta_.mean(axis=0), np.sqrt(step.var_.mean(axis=0)) + step.theta_.std(axis=0)),
    "center_": lambda step: (step.center_, step.center_ * 0 + (1 if step.scale_ is None else step.scale_)),
    "data_min_": lambda step: ((step.data_min_ + step.data_max_) / 2, (step.data_max_ - step.data_min_) / 4),
    "max_abs_": lambda step: (step.max_abs_ * 0, step.max_abs_ / 2),
    "cluster_centers_": lambda step: _of_rows(step.cluster_centers_),
    "means_": lambda step: _of_rows(step.means_),
    "mean_": _of_mean,
    "quantiles_": lambda step: _of_rows(step.quantiles_),
    "lambdas_": _of_powers,
    "bin_edges_": lambda step: tuple(np.transpose([_of_rows(edges) for edges in step.bin_edges_])),
    "_fit_X": lambda step: _of_rows(step._fit_X),  # noqa: SLF001 neighbours keep their rows nowhere else
    "support_vectors_": lambda step: _of_rows(step.support_vectors_),
    "X_train_": lambda step: _of_rows(step.X_train_),
    "statistics_": _of_statistics,
}
"""By the attribute that says it, the most telling first."""
