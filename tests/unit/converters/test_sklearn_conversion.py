"""Fitted estimators of scikit-learn, and the signature that is expected of each."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pandas as pd
import pytest
from sklearn.cluster import DBSCAN, KMeans, MeanShift
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.ensemble import (
    GradientBoostingClassifier,
    HistGradientBoostingClassifier,
    HistGradientBoostingRegressor,
    IsolationForest,
    RandomForestClassifier,
    RandomForestRegressor,
    StackingClassifier,
    StackingRegressor,
    VotingClassifier,
    VotingRegressor,
)
from sklearn.feature_extraction import DictVectorizer
from sklearn.feature_extraction.text import CountVectorizer, HashingVectorizer, TfidfVectorizer
from sklearn.impute import KNNImputer, SimpleImputer
from sklearn.linear_model import Lasso, LinearRegression, LogisticRegression, Ridge
from sklearn.mixture import GaussianMixture
from sklearn.multioutput import MultiOutputClassifier
from sklearn.naive_bayes import GaussianNB, MultinomialNB
from sklearn.neighbors import KNeighborsClassifier, LocalOutlierFactor
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import MinMaxScaler, Normalizer, OneHotEncoder, RobustScaler, StandardScaler
from sklearn.svm import SVC, SVR, LinearSVC
from sklearn.tree import DecisionTreeClassifier, DecisionTreeRegressor

from penstock.converters import GateError, UnsupportedModelError, convert, verify

RANDOM = np.random.default_rng(0)
X = RANDOM.standard_normal((200, 4))
HOLES = np.where(RANDOM.random(X.shape) < 0.1, np.nan, X)
CLASSES = (X[:, 0] + X[:, 1] ** 2 > 0.6).astype(int) + (X[:, 2] > 1)
ANIMALS = np.array(["cat", "dog", "eel"])[CLASSES]
VALUES = X @ [1, 2, 3, 4] + np.sin(X[:, 0])
TEXTS = ["water in the Pipe", "air in the tank", "water water", "tank of air"] * 5
KINDS = ["w", "a", "w", "a"] * 5

FEATURES, TEXT = "features FP32 [batch, 4]", "text BYTES [batch, 1]"
LABEL, PROBABILITIES = "label INT64 [batch]", "probabilities FP32 [batch, 3]"
PREDICTION = "prediction FP32 [batch, 1]"

MEMBERS = [("l", LogisticRegression()), ("f", RandomForestClassifier(5)), ("t", DecisionTreeClassifier())]
REGRESSORS = [("l", Ridge()), ("f", RandomForestRegressor(5))]

CASES: list[tuple[Any, str, list[str], set[str]]] = [
    (LogisticRegression().fit(X, ANIMALS), FEATURES, ["label BYTES [batch]", PROBABILITIES], set()),
    (make_pipeline(StandardScaler(), LogisticRegression()).fit(X, CLASSES), FEATURES, [LABEL, PROBABILITIES], set()),
    (LinearRegression().fit(X, VALUES), FEATURES, [PREDICTION], set()),
    (make_pipeline(MinMaxScaler(), Ridge()).fit(X, VALUES), FEATURES, [PREDICTION], set()),
    (Lasso().fit(X, VALUES), FEATURES, [PREDICTION], set()),
    (DecisionTreeClassifier().fit(X, CLASSES), FEATURES, [LABEL, PROBABILITIES], {"nan", "tie"}),
    (DecisionTreeRegressor().fit(X, VALUES), FEATURES, [PREDICTION], {"nan", "tie"}),
    (RandomForestClassifier(20).fit(X, ANIMALS), FEATURES, ["label BYTES [batch]", PROBABILITIES], {"nan", "tie"}),
    (RandomForestRegressor(20).fit(X, VALUES), FEATURES, [PREDICTION], {"nan", "tie"}),
    (GradientBoostingClassifier(n_estimators=9).fit(X, CLASSES), FEATURES, [LABEL, PROBABILITIES], {"tie"}),
    (HistGradientBoostingClassifier(max_iter=9).fit(HOLES, CLASSES), FEATURES, [LABEL, PROBABILITIES], {"nan", "tie"}),
    (HistGradientBoostingRegressor(max_iter=9).fit(X, VALUES), FEATURES, [PREDICTION], {"nan", "tie"}),
    (IsolationForest(n_estimators=9).fit(X), FEATURES, ["label INT64 [batch, 1]"], {"nan", "tie"}),
    (SVC().fit(X, CLASSES), FEATURES, [LABEL], set()),
    (SVR().fit(X, VALUES), FEATURES, [PREDICTION], set()),
    (LinearSVC().fit(X, CLASSES), FEATURES, [LABEL], set()),
    (KMeans(3, n_init=2).fit(X), FEATURES, [LABEL, "distances FP32 [batch, 3]"], set()),
    (GaussianNB().fit(X, CLASSES), FEATURES, [LABEL, PROBABILITIES], set()),
    (make_pipeline(StandardScaler(), LinearSVC()).fit(X, CLASSES), FEATURES, [LABEL], set()),
    (
        make_pipeline(StandardScaler(), KMeans(3, n_init=2)).fit(X),
        FEATURES,
        [LABEL, "distances FP32 [batch, 3]"],
        set(),
    ),
    (make_pipeline(StandardScaler(), GaussianMixture(3)).fit(X), FEATURES, [LABEL, PROBABILITIES], set()),
    (GaussianMixture(3, covariance_type="tied").fit(X), FEATURES, [LABEL, PROBABILITIES], set()),
    (GaussianMixture(3, covariance_type="spherical").fit(X), FEATURES, [LABEL, PROBABILITIES], set()),
    (LinearDiscriminantAnalysis().fit(X, CLASSES > 0), FEATURES, [LABEL, "probabilities FP32 [batch, 2]"], set()),
    (LinearDiscriminantAnalysis().fit(X, ANIMALS), FEATURES, ["label BYTES [batch]", PROBABILITIES], set()),
    (QuadraticDiscriminantAnalysis().fit(X, ANIMALS), FEATURES, ["label BYTES [batch]", PROBABILITIES], set()),
    (KNeighborsClassifier(3).fit(X, CLASSES), FEATURES, [LABEL, PROBABILITIES], set()),
    (LocalOutlierFactor(novelty=True).fit(X), FEATURES, ["label INT64 [batch, 1]"], set()),
    (
        HistGradientBoostingRegressor(loss="poisson", max_iter=9).fit(X, VALUES**2),
        FEATURES,
        [PREDICTION],
        {"nan", "tie"},
    ),
    (VotingClassifier(MEMBERS).fit(X, ANIMALS), FEATURES, ["label BYTES [batch]"], {"tie"}),
    (VotingClassifier(MEMBERS, voting="soft").fit(X, CLASSES), FEATURES, [LABEL, PROBABILITIES], {"tie"}),
    (StackingClassifier(MEMBERS).fit(X, CLASSES), FEATURES, [LABEL, PROBABILITIES], set()),
    (VotingRegressor(REGRESSORS).fit(X, VALUES), FEATURES, [PREDICTION], {"tie"}),
    (StackingRegressor(REGRESSORS).fit(X, VALUES), FEATURES, [PREDICTION], set()),
    (make_pipeline("passthrough", LogisticRegression()).fit(X, CLASSES), FEATURES, [LABEL, PROBABILITIES], set()),
    (GaussianNB().fit(X, CLASSES * 1.0), FEATURES, [LABEL, PROBABILITIES], set()),
    (
        ColumnTransformer(
            [
                ("a", RobustScaler(), [False, True, False, True]),
                ("b", StandardScaler(), slice(0, 2)),
                ("c", PCA(1), [2, 3]),
            ]
        ).fit(X),
        FEATURES,
        ["transformed FP32 [batch, 5]"],
        set(),
    ),
    (Normalizer().fit(X), FEATURES, ["transformed FP32 [batch, 4]"], set()),
    (Normalizer("l1").fit(X), FEATURES, ["transformed FP32 [batch, 4]"], set()),
    (Normalizer("max").fit(X), FEATURES, ["transformed FP32 [batch, 4]"], set()),
    (RobustScaler().fit(X), FEATURES, ["transformed FP32 [batch, 4]"], {"nan"}),
    (
        make_pipeline(SimpleImputer(), LogisticRegression()).fit(HOLES, CLASSES),
        FEATURES,
        [LABEL, PROBABILITIES],
        {"nan"},
    ),
    (
        make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS, KINDS),
        TEXT,
        ["label BYTES [batch]", "probabilities FP32 [batch, 2]"],
        {"unknown"},
    ),
    (
        make_pipeline(CountVectorizer(), MultinomialNB()).fit(TEXTS, KINDS),
        TEXT,
        ["label BYTES [batch]", "probabilities FP32 [batch, 2]"],
        {"unknown"},
    ),
]


def case_name(case: tuple[Any, ...]) -> str:
    estimator = case[0]
    return "-".join(type(step).__name__ for _, step in getattr(estimator, "steps", [("", estimator)]))


@pytest.mark.parametrize(("estimator", "taken", "given", "kinds"), CASES, ids=map(case_name, CASES))
def test_converts(estimator: Any, taken: str, given: list[str], kinds: set[str], tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    conversion = convert(estimator, path)
    assert [str(spec) for spec in conversion.signature.inputs] == [taken]
    assert [str(spec) for spec in conversion.signature.outputs] == given
    numbers = {"extreme"} if taken == FEATURES else set()
    assert {case.rows for case in conversion.parity.cases} == {"random"} | numbers | kinds
    assert "ZipMap" not in {node.op_type for node in onnx.load(path).graph.node}
    first = path.read_bytes()
    convert(estimator, path)
    assert path.read_bytes() == first


def test_classes_are_metadata(tmp_path: Path) -> None:
    convert(LogisticRegression().fit(X, ANIMALS), tmp_path / "model.onnx")
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "model.onnx").metadata_props}
    assert json.loads(metadata["labels"]) == ["cat", "dog", "eel"]


def test_words_are_lowered_in_a_locale_that_every_image_has(tmp_path: Path) -> None:
    convert(make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(TEXTS, KINDS), tmp_path / "model.onnx")
    (normalizer,) = [n for n in onnx.load(tmp_path / "model.onnx").graph.node if n.op_type == "StringNormalizer"]
    assert {a.name: a.s for a in normalizer.attribute if a.name == "locale"} == {"locale": b"C.UTF-8"}


def table() -> "tuple[pd.DataFrame, Any]":
    rows = pd.DataFrame(
        {
            "age": X[:, 0] * 10 + 40,
            "city": np.array(["Basel", "Zürich", "Bern"], object)[CLASSES],
            "note": np.array(TEXTS * 10, object),
            "height": X[:, 1],
        }
    )
    pipeline = Pipeline(
        [
            (
                "columns",
                ColumnTransformer(
                    [
                        ("numbers", make_pipeline(SimpleImputer(), StandardScaler()), ["age", "height"]),
                        ("city", OneHotEncoder(handle_unknown="ignore"), ["city"]),
                        ("words", CountVectorizer(), "note"),
                    ]
                ),
            ),
            ("model", LogisticRegression(max_iter=500)),
        ]
    )
    return rows, pipeline.fit(rows, CLASSES)


def test_a_table_has_an_input_for_each_column(tmp_path: Path) -> None:
    rows, pipeline = table()
    samples = {name: rows[name].to_numpy()[:, None] for name in rows}
    conversion = convert(pipeline, tmp_path / "model.onnx", samples=samples)
    assert [str(spec) for spec in conversion.signature.inputs] == [
        "age FP32 [batch, 1]",
        "city BYTES [batch, 1]",
        "note BYTES [batch, 1]",
        "height FP32 [batch, 1]",
    ]
    assert {case.rows for case in conversion.parity.cases} == {"random", "extreme", "nan", "unknown", "sample"}


def nearest_thresholds(path: Path, estimator: Any) -> onnx.ModelProto:
    """The graph with thresholds rounded to the nearest float32, as skl2onnx writes them."""
    model = onnx.load(path)
    exact = {(-1, 0.0)}
    for tree in np.ravel(getattr(estimator, "_predictors", [])):
        exact |= {(0, float(t)) for t in tree.nodes["num_threshold"]}
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "nodes_values":
                for index, value in enumerate(attribute.floats):
                    attribute.floats[index] = next(
                        (float(np.float32(t)) for _, t in exact if np.nextafter(np.float32(t), -np.inf) == value), value
                    )
    return model


def test_the_gate_sees_a_threshold_that_is_off_by_a_rounding(tmp_path: Path) -> None:
    estimator = HistGradientBoostingRegressor(max_iter=9).fit(X, VALUES)
    convert(estimator, tmp_path / "model.onnx")
    with pytest.raises(GateError, match="tie rows"):
        verify(nearest_thresholds(tmp_path / "model.onnx", estimator), estimator)


TWO_LABELS = np.column_stack([CLASSES > 0, X[:, 3] > 0]).astype(int)


def words(**options: Any) -> Any:
    return make_pipeline(CountVectorizer(**options), LogisticRegression()).fit(TEXTS, KINDS)


def categorical() -> Any:
    rows = np.column_stack([RANDOM.integers(0, 4, 200), X[:, 0]])
    return HistGradientBoostingRegressor(max_iter=3, categorical_features=[0]).fit(rows, (rows[:, 0] == 2) * 5.0)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (categorical, "splits by categories.*OneHotEncoder"),
        (lambda: RandomForestClassifier(3).fit(X, TWO_LABELS), "RandomForestClassifier gives 2 labels a row.*each"),
        (
            lambda: MultiOutputClassifier(LogisticRegression()).fit(X, TWO_LABELS),
            "MultiOutputClassifier gives 2 labels a row",
        ),
        (lambda: DBSCAN().fit(X), "DBSCAN has neither predict nor transform as it was fitted"),
        (lambda: LocalOutlierFactor().fit(X), r"LocalOutlierFactor has neither.*LocalOutlierFactor\(novelty=True\)"),
        (lambda: KNNImputer().fit(HOLES), "KNNImputer does not convert. Take SimpleImputer instead"),
        (
            lambda: make_pipeline(SimpleImputer(add_indicator=True), LinearSVC()).fit(HOLES, CLASSES),
            r"SimpleImputer\(add_indicator=True\) does not convert",
        ),
        (lambda: OneHotEncoder(max_categories=2).fit(X.round()), "OneHotEncoder with min_frequency or max_categories"),
        (lambda: words(token_pattern=r"\b[a-z]+\b"), r"The token pattern '\\\\b\[a-z\]\+\\\\b' has"),
        (lambda: words(ngram_range=(1, 2), stop_words="english"), "with stop words does not convert"),
        (lambda: words(analyzer="char"), r"CountVectorizer\(analyzer='char'\) does not convert"),
        (lambda: words(strip_accents="unicode"), r"CountVectorizer\(strip_accents='unicode'\) does not convert"),
        (lambda: DictVectorizer().fit([{"a": 1.0}, {"b": 2.0}]), "DictVectorizer does not say how many features"),
        (lambda: HashingVectorizer().fit(TEXTS), "HashingVectorizer does not say how many features.*CountVectorizer"),
        (
            lambda: VotingClassifier([("t", table()[1])]).fit(table()[0], CLASSES),
            "VotingClassifier holds a ColumnTransf",
        ),
        (lambda: MeanShift(bandwidth=2.0).fit(X), "MeanShift"),
        (LogisticRegression, "LogisticRegression is not fitted. Call fit first"),
    ],
)
def test_refuses(build: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        convert(build(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
