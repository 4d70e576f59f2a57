"""XGBoost's and LightGBM's estimators, which skl2onnx converts once it knows onnxmltools' converters of them."""

import json
from collections.abc import Mapping
from typing import Any

from penstock.converters.errors import UnsupportedModelError
from penstock.converters.sklearn_steps import steps_of

_XGBOOST_REFUSED: dict[str, tuple[Any, ...]] = {
    "booster": ("dart", "gblinear"),
    "multi_strategy": ("multi_output_tree",),
    "objective": ("binary:logitraw", "multi:softmax", "reg:logistic", "reg:quantileerror"),
}
_LIGHTGBM_REFUSED: dict[str, tuple[Any, ...]] = {
    "boosting_type": ("rf",),
    "linear_tree": (True,),
    "objective": ("cross_entropy", "multiclassova"),
    "reg_sqrt": (True,),
    "zero_as_missing": (True,),
}
"""What the converters leave out: parameters by the values that they do not convert."""

_OPTIONS = {"nocl": [True, False], "zipmap": [True, False, "columns"]}


def register(estimator: Any) -> None:  # noqa: ANN401 such estimators publish no types
    """Makes skl2onnx know an estimator, or the steps of a pipeline. Raises `UnsupportedModelError`."""
    for step in steps_of(estimator):
        package = type(step).__module__.partition(".")[0]
        if package == "xgboost":
            _register_xgboost(step)
        elif package == "lightgbm":
            _register_lightgbm(step)


def without_names(estimator: Any) -> None:  # noqa: ANN401 such estimators publish no types
    """Takes the names of a table's columns from an XGBoost estimator: its converter knows columns by number alone."""
    if type(estimator).__module__.partition(".")[0] == "xgboost":
        estimator.get_booster().feature_names = None


def estimator_of(model: Any) -> Any:  # noqa: ANN401 such models publish no types
    """The estimator that answers as a bare Booster does; estimators themselves. Raises `UnsupportedModelError`."""
    if type(model).__name__ != "Booster":
        return model
    if type(model).__module__.startswith("lightgbm"):
        raise UnsupportedModelError(
            "A lightgbm.Booster does not convert, its estimators do: train it with LGBMClassifier, LGBMRegressor or "
            "LGBMRanker and convert that."
        )
    from xgboost import XGBClassifier, XGBRegressor  # noqa: PLC0415 only for these

    objective = json.loads(model.save_config())["learner"]["objective"]["name"]
    estimator = XGBClassifier() if objective.startswith(("binary:", "multi:")) else XGBRegressor()
    estimator.load_model(model.save_raw("ubj"))
    return estimator


def splits_of(estimator: Any) -> list[tuple[int, float]]:  # noqa: ANN401 such estimators publish no types
    """The features and thresholds by which an XGBoost or LightGBM estimator splits; none of another."""
    package = type(estimator).__module__.partition(".")[0]
    if package == "xgboost":
        return [
            (feature, threshold)
            for tree in _xgboost_trees(estimator)
            for feature, threshold, left in zip(
                tree["split_indices"], tree["split_conditions"], tree["left_children"], strict=True
            )
            if left >= 0
        ]
    if package == "lightgbm":
        text = estimator.booster_.model_to_string()
        features, thresholds = _lightgbm_line(text, "split_feature"), _lightgbm_line(text, "threshold")
        return [(int(feature), float(threshold)) for feature, threshold in zip(features, thresholds, strict=True)]
    return []


def _xgboost_trees(step: Any) -> list[dict[str, Any]]:  # noqa: ANN401 XGBoost's estimators are of two kinds
    """None of a booster that is no plain sum of trees."""
    booster = json.loads(step.get_booster().save_raw("json"))["learner"]["gradient_booster"]
    trees: list[dict[str, Any]] = booster["model"]["trees"] if booster["name"] == "gbtree" else []
    return trees


def _lightgbm_line(text: str, name: str) -> list[str]:
    """The values of every tree's line of this name, in the order of the trees."""
    return [value for line in text.splitlines() if line.startswith(f"{name}=") for value in line.split("=")[1].split()]


def _register_xgboost(step: Any) -> None:  # noqa: ANN401 XGBoost's estimators are of two kinds
    from onnxmltools.convert.xgboost.operator_converters.XGBoost import convert_xgboost  # noqa: PLC0415 only for these
    from skl2onnx import update_registered_converter  # noqa: PLC0415
    from skl2onnx.common import shape_calculator as shapes  # noqa: PLC0415
    from xgboost import XGBClassifier, XGBRanker, XGBRegressor  # noqa: PLC0415

    _check_parameters(step, _XGBOOST_REFUSED)
    if step.get_params().get("num_parallel_tree") not in {None, 1}:
        raise _refused(step, "num_parallel_tree", step.get_params()["num_parallel_tree"])
    if any(tree["categories_nodes"] for tree in _xgboost_trees(step)):
        raise _categorical(step)
    update_registered_converter(
        XGBClassifier,
        "XGBoostXGBClassifier",
        shapes.calculate_linear_classifier_output_shapes,
        convert_xgboost,
        options=_OPTIONS,
    )
    for kind in (XGBRanker, XGBRegressor):
        update_registered_converter(
            kind, f"XGBoost{kind.__name__}", shapes.calculate_linear_regressor_output_shapes, convert_xgboost
        )


def _register_lightgbm(step: Any) -> None:  # noqa: ANN401 LightGBM's estimators are of two kinds
    from lightgbm import LGBMClassifier, LGBMRanker, LGBMRegressor  # noqa: PLC0415 only for these
    from onnxmltools.convert.lightgbm.operator_converters.LightGbm import convert_lightgbm  # noqa: PLC0415
    from skl2onnx import update_registered_converter  # noqa: PLC0415
    from skl2onnx.common import shape_calculator as shapes  # noqa: PLC0415

    _check_parameters(step, _LIGHTGBM_REFUSED)
    if any("cat_threshold=" in line for line in step.booster_.model_to_string().splitlines()):
        raise _categorical(step)
    update_registered_converter(
        LGBMClassifier,
        "LightGbmLGBMClassifier",
        shapes.calculate_linear_classifier_output_shapes,
        convert_lightgbm,
        options=_OPTIONS,
    )
    for kind in (LGBMRanker, LGBMRegressor):
        update_registered_converter(
            kind,
            f"LightGbm{kind.__name__}",
            shapes.calculate_linear_regressor_output_shapes,
            convert_lightgbm,
            options={"split": None},
        )


def _check_parameters(step: Any, refused: Mapping[str, tuple[Any, ...]]) -> None:  # noqa: ANN401 such estimators publish no types
    parameters = step.get_params()
    for name, values in refused.items():
        if parameters.get(name) in values:
            raise _refused(step, name, parameters[name])


def _refused(step: Any, name: str, value: Any) -> UnsupportedModelError:  # noqa: ANN401 such estimators publish no types
    return UnsupportedModelError(
        f"{type(step).__qualname__}({name}={value!r}) does not convert: its converter leaves {name} out. Fit it "
        f"without; for a linear model take Ridge or LogisticRegression."
    )


def _categorical(step: Any) -> UnsupportedModelError:  # noqa: ANN401 such estimators publish no types
    return UnsupportedModelError(
        f"{type(step).__qualname__} splits by categories, which its converter cannot say in ONNX. Fit it on encoded "
        "categories (OneHotEncoder), without categorical features."
    )
