"""The estimators inside an estimator: steps of pipelines, members of ensembles, what a search found."""

from collections.abc import Iterator
from typing import Any

import numpy as np

_INNER = ("best_estimator_", "estimator_", "calibrated_classifiers_", "estimators_", "final_estimator_")
_NAMED = ("steps", "transformers_", "transformer_list")


def steps_of(estimator: Any) -> Iterator[Any]:  # noqa: ANN401 scikit-learn publishes no types
    """The estimator and every fitted one inside it, each before its own, in the order of the graph."""
    yield estimator
    for inner in members_of(estimator):
        yield from steps_of(inner)


def members_of(estimator: Any) -> Iterator[Any]:  # noqa: ANN401 scikit-learn publishes no types
    """The fitted estimators directly inside one."""
    for attribute in _NAMED:
        for named in getattr(estimator, attribute, ()):
            if hasattr(named[1], "get_params"):
                yield named[1]
    for attribute in _INNER:
        for inner in _flat(getattr(estimator, attribute, ())):
            fitted = getattr(inner, "estimator", inner) if attribute == "calibrated_classifiers_" else inner
            if hasattr(fitted, "get_params"):
                yield fitted


def last_of(estimator: Any) -> Any:  # noqa: ANN401 scikit-learn publishes no types
    """The step that gives the answers."""
    if hasattr(estimator, "best_estimator_"):
        return last_of(estimator.best_estimator_)
    steps = getattr(estimator, "steps", None)
    return last_of(steps[-1][1]) if steps else estimator


def seeing(estimator: Any) -> Iterator[Any]:  # noqa: ANN401 scikit-learn publishes no types
    """The estimators that see the rows as they come, the most telling first."""
    if hasattr(estimator, "steps"):
        steps = [step for _, step in estimator.steps if step is not None and not isinstance(step, str)]
        if len(steps) > 1 and hasattr(steps[0], "statistics_"):
            yield from seeing(steps[1])  # an imputer leaves the columns where they are
        if steps:
            yield from seeing(steps[0])
        return
    yield estimator
    last = getattr(estimator, "final_estimator_", None)  # it sees the answers of the others
    for member in members_of(estimator):
        if member is not last:
            yield from seeing(member)


def _flat(found: Any) -> Iterator[Any]:  # noqa: ANN401 an estimator, or lists and arrays of them
    if isinstance(found, list | tuple | np.ndarray):
        for item in found:
            yield from _flat(item)
    else:
        yield found
