"""Boosters of other packages behind scikit-learn's interface."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightgbm
import numpy as np
import pytest

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
