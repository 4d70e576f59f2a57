"""What converted scikit-learn estimators answer to rows that the gate has not drawn, where conversions went wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pandas as pd
import pytest
from numpy.typing import NDArray
from sklearn.cluster import KMeans
from sklearn.compose import ColumnTransformer
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.ensemble import HistGradientBoostingRegressor, IsolationForest, RandomForestClassifier
from sklearn.feature_extraction.text import CountVectorizer, TfidfVectorizer
from sklearn.impute import SimpleImputer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.mixture import GaussianMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import MinMaxScaler, OneHotEncoder, OrdinalEncoder, RobustScaler, StandardScaler
from sklearn.svm import SVC
from sklearn.tree import DecisionTreeRegressor

from penstock.converters import GateError, UnsupportedModelError, convert, verify
from penstock.converters.sklearn_source import SklearnSource
from penstock.converters.sklearn_text import tokenizer_pattern

RANDOM = np.random.default_rng(5)
NEAR = RANDOM.standard_normal((300, 4))
CLASSES = (NEAR[:, 0] + NEAR[:, 1] ** 2 > 0.5).astype(int)
SCALES, PLACES = np.array([1e3, 1.0, 2.6e5, 50.0]), np.array([1e6, 5e3, 1.7e9, 100.0])
FAR = (NEAR * SCALES + PLACES).astype(np.float32).astype(np.float64)
FRESH = (RANDOM.standard_normal((500, 4)) * SCALES + PLACES).astype(np.float32)
VALUES = NEAR @ [1, 2, 3, 4]

ASKED = {"label": "predict", "probabilities": "predict_proba", "prediction": "predict"}


def answers(path: Path, rows: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return dict(zip([output.name for output in session.get_outputs()], session.run(None, rows), strict=True))


def check(path: Path, rows: dict[str, NDArray[Any]], estimator: Any, given: Any) -> None:
    """Every output of the file is what the estimator says of the same rows."""
    for name, answer in answers(path, rows).items():
        expected = np.asarray(getattr(estimator, ASKED.get(name, "transform"))(given))
        np.testing.assert_allclose(answer, expected.reshape(answer.shape), rtol=1e-3, atol=1e-4)


def folded(model: Any) -> Any:
    """A linear model of rows around zero as one of the rows as they come."""
    model.coef_ = model.coef_ / SCALES
    model.intercept_ = model.intercept_ - model.coef_ @ PLACES
    return model


FAR_ESTIMATORS = [
    LinearDiscriminantAnalysis().fit(FAR, CLASSES),
    QuadraticDiscriminantAnalysis(solver="eigen", shrinkage=0.1).fit(FAR, CLASSES),
    KMeans(3, n_init=1, random_state=0).fit(FAR),
    GaussianNB().fit(FAR, CLASSES),
    GaussianMixture(2, covariance_type="diag", random_state=0).fit(FAR),
    PCA(2).fit(FAR),
    PCA(2, whiten=True).fit(FAR),
    StandardScaler().fit(FAR),
    RobustScaler().fit(FAR),
    MinMaxScaler(clip=True).fit(FAR),
    make_pipeline(StandardScaler(), SVC()).fit(FAR, CLASSES),
    LinearRegression().fit(FAR, VALUES),
    LinearRegression().fit(FAR, np.column_stack([VALUES, 1e4 * VALUES])),
    folded(LogisticRegression().fit(NEAR, CLASSES)),
    folded(LogisticRegression().fit(NEAR, CLASSES + (NEAR[:, 2] > 1))),
    make_pipeline(StandardScaler(), KMeans(3, n_init=1, random_state=0)).fit(FAR),
    make_pipeline(StandardScaler(), DecisionTreeRegressor()).fit(FAR, VALUES),
]


@pytest.mark.parametrize("estimator", FAR_ESTIMATORS, ids=lambda estimator: type(estimator).__name__)
def test_features_far_from_zero(estimator: Any, tmp_path: Path) -> None:
    convert(estimator, tmp_path / "model.onnx")
    check(tmp_path / "model.onnx", {"features": FRESH}, estimator, FRESH.astype(np.float64))


@pytest.mark.parametrize(
    "estimator", [*FAR_ESTIMATORS[:3], *FAR_ESTIMATORS[4:11], FAR_ESTIMATORS[-1]], ids=lambda e: type(e).__name__
)
def test_rows_are_drawn_where_the_estimator_was_trained(estimator: Any) -> None:
    rows = SklearnSource(estimator).random_rows({"features": (200, 4)}, 0)["features"]
    assert (np.abs(rows.mean(axis=0) - PLACES) < 3 * SCALES).all()
    assert (rows.std(axis=0) < 5 * SCALES).all()


def test_the_gate_sees_what_float32_loses_far_from_zero(tmp_path: Path) -> None:
    far = KMeans(2, n_init=1, random_state=0).fit(FAR[:, :1])
    convert(far, tmp_path / "model.onnx")
    far.cluster_centers_ = far.cluster_centers_ + 100
    with pytest.raises(GateError, match="random rows"):
        verify(tmp_path / "model.onnx", far)


SPANISH = ["vende or café", "señor café", "or or tea", "señor tea naïve"] * 5
KINDS = [0, 1, 0, 1] * 5
TEXTS = [
    "señor",
    "naïve señor",
    "SEÑOR, or",
    "or\u00a0tea",
    "tea\u3000CAFÉ-or",
    "schön or x",
    "",
    "ñor or1 _or",
    "½ ½tea",
]


@pytest.mark.parametrize(
    "vectorizer",
    [
        CountVectorizer(),
        TfidfVectorizer(),
        CountVectorizer(ngram_range=(1, 2)),
        CountVectorizer(lowercase=False),
        CountVectorizer(token_pattern=r"(?u)\b\w+\b"),
        CountVectorizer(token_pattern=r"\S+"),
        CountVectorizer(token_pattern=r"[a-zñé]+"),
        CountVectorizer(token_pattern=r"[\w-]+"),
    ],
    ids=lambda vectorizer: f"{type(vectorizer).__name__}-{vectorizer.token_pattern}",
)
def test_words_have_letters_beyond_ascii(vectorizer: Any, tmp_path: Path) -> None:
    estimator = make_pipeline(vectorizer, LogisticRegression()).fit(SPANISH, KINDS)
    convert(estimator, tmp_path / "model.onnx")
    check(tmp_path / "model.onnx", {"text": np.array(TEXTS, object)[:, None]}, estimator, TEXTS)


def test_the_gate_sees_words_of_ascii_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    estimator = make_pipeline(CountVectorizer(), LogisticRegression()).fit(["tea or", "good tea"] * 9, [0, 1] * 9)
    monkeypatch.setattr("penstock.converters.sklearn_text.tokenizer_pattern", lambda _: "[a-zA-Z0-9_]{2,}")
    with pytest.raises(GateError, match="random rows"):
        convert(estimator, tmp_path / "model.onnx")


@pytest.mark.parametrize(
    "pattern", [r"\b[a-z]+\b", r"ab|abc", r"a+?", r"(?i)a", r"(a)b", r"[^\W]", r"^a", r"\Ba", r"a{,3}"]
)
def test_patterns_that_mean_something_else_there_are_refused(pattern: str) -> None:
    with pytest.raises(UnsupportedModelError, match="The token pattern"):
        tokenizer_pattern(pattern)


TABLE = pd.DataFrame(
    {
        "age": RANDOM.normal(40, 10, 300),
        "zip": RANDOM.choice([16777217, 16777219, 123456789, 2**53 + 1], 300),
        "size": RANDOM.choice([0.1, 1.5, 2.7], 300),
        "half": RANDOM.choice([0.5, 1.5, 2.0], 300),
        "city": pd.Series(RANDOM.choice(["Köln", "Bern", "Basel"], 300), dtype=object),
    }
)
BOUGHT = (TABLE["zip"] > 16777218).astype(int) + (TABLE["size"] > 1)
HOLES = TABLE.assign(city=TABLE["city"].where(RANDOM.random(300) > 0.1, np.nan))
ONE_HOT = OneHotEncoder(handle_unknown="ignore")


def most_frequent() -> Any:
    return make_pipeline(SimpleImputer(strategy="most_frequent"), OneHotEncoder(handle_unknown="ignore"))


def constant() -> Any:
    return make_pipeline(SimpleImputer(strategy="constant", fill_value="?"), OneHotEncoder(handle_unknown="ignore"))


@pytest.mark.parametrize(
    ("encoder", "columns", "rows", "datatypes"),
    [
        (ONE_HOT, ["zip"], TABLE, ["INT64"]),
        (OneHotEncoder(drop="first"), ["zip", "half"], TABLE, ["INT64", "FP32"]),
        (OrdinalEncoder(), ["zip"], TABLE, ["INT64"]),
        (ONE_HOT, ["size"], TABLE, ["FP64"]),
        (ONE_HOT, ["half", "city", "zip"], TABLE, ["FP32", "BYTES", "INT64"]),
        (most_frequent(), ["city"], HOLES, ["BYTES"]),
        (constant(), ["city"], HOLES, ["BYTES"]),
    ],
    ids=["ids", "dropped", "ordinal", "fractions", "mixed", "most-frequent", "constant"],
)
def test_categories_of_a_table(
    encoder: Any, columns: list[str], rows: pd.DataFrame, datatypes: list[str], tmp_path: Path
) -> None:
    encoded = ColumnTransformer([("n", StandardScaler(), ["age"]), ("c", encoder, columns)])
    estimator = make_pipeline(encoded, LogisticRegression()).fit(rows[["age", *columns]], BOUGHT)
    conversion = convert(estimator, tmp_path / "model.onnx")
    assert [spec.datatype for spec in conversion.signature.inputs] == ["FP32", *datatypes]
    types = {"FP32": np.float32, "FP64": np.float64, "INT64": np.int64, "BYTES": object}
    given = TABLE[["age", *columns]].astype({"age": np.float32})
    feed = {spec.name: given[[spec.name]].to_numpy(types[spec.datatype]) for spec in conversion.signature.inputs}
    check(tmp_path / "model.onnx", feed, estimator, given)


def test_a_number_between_categories_is_none_of_them(tmp_path: Path) -> None:
    estimator = OneHotEncoder(handle_unknown="ignore").fit(np.array([[0.0], [1.0], [2.0], [np.nan]]))
    convert(estimator, tmp_path / "model.onnx")
    rows = np.array([[0], [1.5], [2.7], [-0.4], [2], [1e-37], [np.nan], [99]], np.float32)
    check(tmp_path / "model.onnx", {"features": rows}, Dense(estimator), rows.astype(np.float64))


class Dense:
    """An estimator whose sparse answers are dense."""

    def __init__(self, estimator: Any) -> None:
        self._estimator = estimator

    def transform(self, rows: NDArray[Any]) -> NDArray[Any]:
        dense: NDArray[Any] = self._estimator.transform(rows).toarray()
        return dense


def mixed_categories() -> Any:
    return OneHotEncoder().fit(np.array([["a"], ["b"], [None]], object))


@pytest.mark.parametrize(
    ("build", "message"), [(mixed_categories, "categories that are no texts beside texts.*SimpleImputer")]
)
def test_refuses(build: Callable[[], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        convert(build(), tmp_path / "model.onnx")


PRICES = np.round(RANDOM.uniform(0, 20, (600, 4)), 2)


@pytest.mark.parametrize(
    "estimator",
    [
        # Its splits are in float64, and so is what it gets.
        make_pipeline(StandardScaler(), HistGradientBoostingRegressor(max_iter=20)),
        # From ten trees on, they stand in the graph in another order.
        IsolationForest(n_estimators=12, random_state=0),
    ],
    ids=["scaled", "reordered"],
)
def test_trees_go_the_same_way(estimator: Any, tmp_path: Path) -> None:
    estimator.fit(PRICES, PRICES[:, 0] * PRICES[:, 1])
    convert(estimator, tmp_path / "model.onnx")
    rows = PRICES.astype(np.float32)
    rows[::3, 0] = np.nan
    check(tmp_path / "model.onnx", {"features": rows}, estimator, rows.astype(np.float64))


@pytest.mark.parametrize("seed", range(3))
def test_classes_that_rounding_decides(seed: int, tmp_path: Path) -> None:
    """Ten of twenty trees say one thing, ten the other, on some rows of every forest."""
    forest = RandomForestClassifier(20, random_state=seed).fit(PRICES, np.where(PRICES @ [1, 2, 3, 4] > 90, "a", "b"))
    rows = np.random.default_rng(seed).uniform(0, 20, (5000, 4)).astype(np.float32)
    convert(forest, tmp_path / "model.onnx", samples={"features": rows})
