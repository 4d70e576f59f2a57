"""What skl2onnx has to be told of an estimator besides the estimator."""

import copy
from typing import Any

import numpy as np
from sklearn.feature_extraction.text import CountVectorizer

from penstock.converters.errors import UnsupportedModelError
from penstock.converters.sklearn_boosters import register, without_names
from penstock.converters.sklearn_steps import steps_of
from penstock.converters.sklearn_text import text_options


def prepared(estimator: Any) -> Any:  # noqa: ANN401 scikit-learn publishes no types
    """The estimator, or a copy that skl2onnx takes: it refuses what has no part in predictions."""
    if not any(_is_refused(step) for step in steps_of(estimator)):
        return estimator
    changed = copy.deepcopy(estimator)
    for step in steps_of(changed):
        if hasattr(step, "flatten_transform"):
            step.flatten_transform = False
        if hasattr(step, "steps"):
            step.steps = [named for named in step.steps if hasattr(named[1], "get_params")]
        if hasattr(step, "transformers_"):
            step.transformers_ = [(name, fitted, _positions(columns)) for name, fitted, columns in step.transformers_]
        without_names(step)
    return changed


def options_of(estimator: Any) -> dict[int, dict[str, Any]]:  # noqa: ANN401 scikit-learn publishes no types
    """Probabilities as a matrix, and words as Python finds them. Raises `UnsupportedModelError`."""
    options: dict[int, dict[str, Any]] = {}
    for step in steps_of(estimator):
        if isinstance(step, CountVectorizer):
            options[id(step)] = text_options(step)
        elif hasattr(step, "predict") and not hasattr(step, "steps"):
            options[id(step)] = {"zipmap": False} if "zipmap" in _known_options(step) else {}
    return options


def check_steps(estimator: Any) -> None:  # noqa: ANN401 scikit-learn publishes no types
    """Raises `UnsupportedModelError` for what skl2onnx converts wrongly or into operators that no one has."""
    for step in steps_of(estimator):
        _check(step)
        if isinstance(step, CountVectorizer):
            text_options(step)
    register(estimator)


def _check(step: Any) -> None:  # noqa: ANN401 scikit-learn publishes no types
    name = type(step).__qualname__
    if name in _REPLACEMENTS:
        raise UnsupportedModelError(f"{name} does not convert. Take {_REPLACEMENTS[name]} instead, and fit again.")
    if getattr(step, "add_indicator", False):
        raise UnsupportedModelError(
            f"{name}(add_indicator=True) does not convert: skl2onnx leaves the indicators out. Fit it without them."
        )
    if getattr(step, "_infrequent_enabled", False):
        raise UnsupportedModelError(
            f"{name} with min_frequency or max_categories does not convert. Join rare categories before the fit."
        )


_REPLACEMENTS = {
    "BayesianGaussianMixture": "GaussianMixture",
    "GaussianProcessClassifier": "SVC(probability=True) or LogisticRegression",
    "KNNImputer": "SimpleImputer",
    "MissingIndicator": "SimpleImputer",
    "OneVsOneClassifier": "OneVsRestClassifier",
    "SplineTransformer": "PolynomialFeatures or KBinsDiscretizer(encode='ordinal')",
}


def _known_options(step: Any) -> frozenset[str]:  # noqa: ANN401 scikit-learn publishes no types
    from skl2onnx._supported_operators import sklearn_operator_name_map  # noqa: PLC0415 slow, and only for conversions
    from skl2onnx.common._registration import _converter_pool  # noqa: PLC0415

    converter = _converter_pool.get(sklearn_operator_name_map.get(type(step)))
    return frozenset((converter and converter.get_allowed_options()) or ())


def _is_refused(step: Any) -> bool:  # noqa: ANN401 scikit-learn publishes no types
    has_names = type(step).__module__.startswith("xgboost") and step.get_booster().feature_names is not None
    passes = any(not hasattr(inner, "get_params") for _, inner in getattr(step, "steps", ()))
    masked = any(_is_mask(columns) for _, _, columns in getattr(step, "transformers_", ()))
    return has_names or passes or masked or bool(getattr(step, "flatten_transform", False))


def _is_mask(columns: Any) -> bool:  # noqa: ANN401 names, positions, a mask or a slice
    return not isinstance(columns, slice) and np.asarray(columns).dtype.kind == "b"


def _positions(columns: Any) -> Any:  # noqa: ANN401 names, positions, a mask or a slice
    """skl2onnx takes the values of a mask for positions."""
    return np.flatnonzero(columns).tolist() if _is_mask(columns) else columns
