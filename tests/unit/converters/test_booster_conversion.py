"""Boosters of other packages behind scikit-learn's interface."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pandas as pd
import pytest
from sklearn.ensemble import VotingClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from penstock.converters import UnsupportedModelError, convert

xgboost = pytest.importorskip("xgboost", reason="xgboost-cpu is for Linux alone")

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((200, 4))
CLASSES = (X[:, 0] + X[:, 1] ** 2 > 0.6).astype(int) + (X[:, 2] > 1)
VALUES = X @ [1, 2, 3, 4]
CATEGORIES = np.column_stack([RANDOM.integers(0, 4, 200), X[:, 0]])
MIDDLE = (CATEGORIES[:, 0] == 2) * 5.0 + (CATEGORIES[:, 0] == 0)


def lgbm(kind: str) -> Any:
    return getattr(lightgbm, f"LGBM{kind}")(n_estimators=5, n_jobs=1, verbose=-1, min_data_per_group=5, cat_smooth=1)


def xgb(kind: str, **options: Any) -> Any:
    return getattr(xgboost, f"XGB{kind}")(n_estimators=5, n_jobs=1, **options)


CLASSIFIED = ["label INT64 [batch]", "probabilities FP32 [batch, 3]"]
TWO = ["label INT64 [batch]", "probabilities FP32 [batch, 2]"]
PREDICTED = ["prediction FP32 [batch, 1]"]


@pytest.mark.parametrize("make", [lgbm, xgb])
@pytest.mark.parametrize(
    ("kind", "target", "outputs"),
    [
        ("Classifier", CLASSES, CLASSIFIED),
        ("Classifier", (CLASSES > 0).astype(int), TWO),
        ("Regressor", VALUES, PREDICTED),
    ],
)
def test_converts(make: Callable[[str], Any], kind: str, target: Any, outputs: list[str], tmp_path: Path) -> None:
    conversion = convert(make(kind).fit(X, target), tmp_path / "model.onnx")
    assert [str(spec) for spec in conversion.signature.outputs] == outputs
    assert {case.rows for case in conversion.parity.cases} >= {"random", "extreme", "nan", "tie"}


FRAME = pd.DataFrame(X, columns=["age", "height", "weight", "size"])
GROUPS = [100, 100]


def booster(objective: str, rows: Any, target: Any, **options: Any) -> Any:
    return xgboost.train({"objective": objective, "nthread": 1, **options}, xgboost.DMatrix(rows, target), 5)


@pytest.mark.parametrize(
    ("build", "outputs"),
    [
        (lambda: xgb("Classifier").fit(FRAME, CLASSES), CLASSIFIED),
        (lambda: xgb("Ranker").fit(X, CLASSES, group=GROUPS), PREDICTED),
        (lambda: lgbm("Ranker").fit(X, CLASSES, group=GROUPS), PREDICTED),
        (lambda: booster("binary:logistic", X, CLASSES > 0), TWO),
        (lambda: booster("multi:softprob", FRAME, CLASSES, num_class=3), CLASSIFIED),
        (lambda: booster("reg:squarederror", X, VALUES), PREDICTED),
        (lambda: make_pipeline(StandardScaler(), lgbm("Regressor")).fit(X, VALUES), PREDICTED),
        (lambda: make_pipeline(StandardScaler(), xgb("Regressor")).fit(X, VALUES), PREDICTED),
        (
            lambda: VotingClassifier([("x", xgb("Classifier")), ("l", lgbm("Classifier"))]).fit(X, CLASSES),
            CLASSIFIED[:1],
        ),
    ],
    ids=["frame", "xgb-rank", "lgb-rank", "binary", "multi", "regression", "scaled-lgb", "scaled-xgb", "voting"],
)
def test_converts_in_other_shapes(build: Callable[[], Any], outputs: list[str], tmp_path: Path) -> None:
    model = build()
    conversion = convert(model, tmp_path / "model.onnx")
    assert [str(spec) for spec in conversion.signature.outputs] == outputs
    names = getattr(model, "feature_names", None) or getattr(model, "feature_names_in_", None)
    assert names is None or list(names) in ([*FRAME], [f"f{index}" for index in range(4)])


def test_lightgbm_reads_the_smallest_numbers_as_zero(tmp_path: Path) -> None:
    rows = np.where(np.abs(X) < 0.5, 0, X)
    estimator = lgbm("Regressor").fit(rows, (rows[:, 0] >= 0) * 5.0)
    assert "threshold=-1.0000000180025095e-35" in estimator.booster_.model_to_string()
    convert(estimator, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: xgb("Classifier", booster="dart").fit(X, CLASSES), r"XGBClassifier\(booster='dart'\) does not"),
        (lambda: xgb("Regressor", booster="gblinear").fit(X, VALUES), "booster='gblinear'.*take Ridge"),
        (lambda: xgb("Regressor", num_parallel_tree=3).fit(X, VALUES), "num_parallel_tree=3"),
        (lambda: lgbm("Regressor").set_params(zero_as_missing=True).fit(X, VALUES), "zero_as_missing=True"),
        (lambda: lgbm("Regressor").set_params(linear_tree=True).fit(X, VALUES), "linear_tree=True"),
        (lambda: lgbm("Regressor").fit(X, VALUES).booster_, "lightgbm.Booster does not convert.*LGBMClassifier"),
    ],
)
def test_refuses_by_name(build: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        convert(build(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "build",
    [
        lambda: lgbm("Regressor").fit(CATEGORIES, MIDDLE, categorical_feature=[0]),
        lambda: xgb("Regressor", enable_categorical=True, feature_types=["c", "q"]).fit(CATEGORIES, MIDDLE),
    ],
    ids=["lightgbm", "xgboost"],
)
def test_categorical_splits_are_refused(build: Callable[[], Any], tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"splits by categories.*OneHotEncoder"):
        convert(build(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
