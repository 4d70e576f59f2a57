"""Estimators whose conversion by skl2onnx is wrong or loses what float32 loses of large numbers, in our own words.

Inputs are FP32 as elsewhere; what is a difference of large numbers is computed in FP64, as scikit-learn does.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import TensorProto
from sklearn.cluster import KMeans, MiniBatchKMeans
from sklearn.decomposition import PCA, IncrementalPCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis, QuadraticDiscriminantAnalysis
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.impute import SimpleImputer
from sklearn.linear_model import (
    ElasticNet,
    ElasticNetCV,
    Lasso,
    LassoCV,
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    Ridge,
    RidgeCV,
)
from sklearn.mixture import GaussianMixture
from sklearn.naive_bayes import GaussianNB
from sklearn.preprocessing import MaxAbsScaler, MinMaxScaler, Normalizer, OneHotEncoder, RobustScaler, StandardScaler

Convert = Callable[[Any, Any, Any], None]
"""A converter of skl2onnx: of its scope, the operator, and the container that takes nodes."""


@dataclass(frozen=True)
class _Writer:
    """Puts nodes into skl2onnx's container."""

    scope: Any
    operator: Any
    container: Any

    @property
    def estimator(self) -> Any:  # noqa: ANN401 scikit-learn publishes no types
        return self.operator.raw_operator

    def node(self, kind: str, *inputs: Any, output: str = "", domain: str = "", **attributes: Any) -> str:  # noqa: ANN401
        """The name of the node's output. Inputs are names, or arrays that become constants."""
        names = [value if isinstance(value, str) else self._constant(value) for value in inputs]
        output = output or self.scope.get_unique_variable_name(kind.lower())
        name = self.scope.get_unique_operator_name(kind)
        self.container.add_node(kind, names, output, op_domain=domain, name=name, **attributes)
        return output

    def rows(self) -> str:
        """All inputs beside each other, in FP64."""
        columns = [self.node("Cast", value.full_name, to=TensorProto.DOUBLE) for value in self.operator.inputs]
        return columns[0] if len(columns) == 1 else self.node("Concat", *columns, axis=1)

    def give(self, position: int, name: str) -> None:
        """Makes a tensor an output of the estimator, in the datatype that skl2onnx expects there."""
        variable = self.operator.outputs[position]
        kind = type(variable.type).__name__
        to = {
            "DoubleTensorType": TensorProto.DOUBLE,
            "FloatTensorType": TensorProto.FLOAT,
            "Int64TensorType": TensorProto.INT64,
        }
        if kind in to:
            self.node("Cast", name, output=variable.full_name, to=to[kind])
        else:
            self.node("Identity", name, output=variable.full_name)

    def labels(self, index: str) -> None:
        """Makes the classes at these positions the first output."""
        classes = np.asarray(self.estimator.classes_)
        classes = classes.astype(np.int64) if classes.dtype.kind == "f" else classes
        self.give(0, self.node("Gather", classes, index, axis=0))

    def _constant(self, value: Any) -> str:  # noqa: ANN401 numbers or texts
        array = np.asarray(value)
        name: str = self.scope.get_unique_variable_name("constant")
        if array.dtype.kind in "OU":
            kind, items = TensorProto.STRING, [str(item).encode() for item in array.ravel()]
        elif array.dtype.kind in "biu":
            kind, items = TensorProto.INT64, array.ravel().tolist()
        else:
            kind, items = TensorProto.DOUBLE, array.ravel().tolist()
        self.container.add_initializer(name, kind, list(array.shape), items)
        return name


def _scaler(scope: Any, operator: Any, container: Any) -> None:  # noqa: ANN401 skl2onnx publishes no types
    writer = _Writer(scope, operator, container)
    scaler, rows = writer.estimator, writer.rows()
    if isinstance(scaler, MinMaxScaler):
        rows = writer.node("Add", writer.node("Mul", rows, scaler.scale_), scaler.min_)
        if scaler.clip:
            low, high = map(float, scaler.feature_range)
            rows = writer.node("Max", writer.node("Min", rows, high), low)
    else:
        centre = scaler.mean_ if isinstance(scaler, StandardScaler) else getattr(scaler, "center_", None)
        if centre is not None and getattr(scaler, "with_mean", True):
            rows = writer.node("Sub", rows, centre)
        if scaler.scale_ is not None:
            rows = writer.node("Div", rows, scaler.scale_)
    writer.give(0, rows)


def _normalizer(scope: Any, operator: Any, container: Any) -> None:  # noqa: ANN401 skl2onnx publishes no types
    """Rows of next to nothing stay as they are, which skl2onnx's are not."""
    writer = _Writer(scope, operator, container)
    rows = writer.rows()
    sizes = writer.node("Abs", rows)
    if writer.estimator.norm == "max":
        norms = writer.node("ReduceMax", sizes, np.array([1]), keepdims=1)
    elif writer.estimator.norm == "l1":
        norms = writer.node("ReduceSum", sizes, np.array([1]), keepdims=1)
    else:
        norms = writer.node("Sqrt", writer.node("ReduceSum", writer.node("Mul", rows, rows), np.array([1]), keepdims=1))
    is_nothing = writer.node("Less", norms, 10 * np.finfo(np.float64).eps)
    writer.give(0, writer.node("Div", rows, writer.node("Where", is_nothing, 1.0, norms)))


def _k_means(scope: Any, operator: Any, container: Any) -> None:  # noqa: ANN401 skl2onnx publishes no types
    writer = _Writer(scope, operator, container)
    centers = writer.estimator.cluster_centers_.astype(np.float64)
    rows = writer.rows()
    # |x|² − 2xc + |c|², whose terms cancel where the centres lie far from zero for their distance.
    products = writer.node("MatMul", rows, -2 * centers.T)
    partial = writer.node("Add", products, np.square(centers).sum(axis=1))
    squares = writer.node("ReduceSum", writer.node("Mul", rows, rows), np.array([1]), keepdims=1)
    distances = writer.node("Sqrt", writer.node("Max", writer.node("Add", partial, squares), 0.0))
    writer.give(0, writer.node("ArgMin", partial, axis=1, keepdims=0))
    writer.give(1, distances)


def _linear_discriminant(scope: Any, operator: Any, container: Any) -> None:  # noqa: ANN401 skl2onnx publishes no types
    writer = _Writer(scope, operator, container)
    model = writer.estimator
    scores = writer.node("Add", writer.node("MatMul", writer.rows(), model.coef_.T), model.intercept_)
    if len(model.classes_) == 2:
        # skl2onnx takes the softmax of the score and its negative, which is the sigmoid of twice the score.
        scores = writer.node("Concat", writer.node("Mul", scores, 0.0), scores, axis=1)
    writer.labels(writer.node("ArgMax", scores, axis=1, keepdims=0))
    writer.give(1, writer.node("Softmax", scores, axis=1))


_FAR = 64.0
"""An intercept above this takes from the features what lies far from zero."""


def _logistic(scope: Any, operator: Any, container: Any) -> None:  # noqa: ANN401 skl2onnx publishes no types
    model = operator.raw_operator
    one_by_one = len(model.classes_) > 2 and getattr(model, "solver", "") == "liblinear"
    if one_by_one or not _lies_far(model):
        _converter_of(operator)(scope, operator, container)
    else:
        _linear_discriminant(scope, operator, container)


def _linear(scope: Any, operator: Any, container: Any) -> None:  # noqa: ANN401 skl2onnx publishes no types
    model = operator.raw_operator
    if not _lies_far(model):
        _converter_of(operator)(scope, operator, container)
        return
    writer = _Writer(scope, operator, container)
    coefficients = np.atleast_2d(model.coef_)
    sums = writer.node("MatMul", writer.rows(), coefficients.T)
    writer.give(0, writer.node("Add", sums, np.broadcast_to(model.intercept_, len(coefficients))))


def _lies_far(model: Any) -> bool:  # noqa: ANN401 scikit-learn publishes no types
    """Whether what the intercept takes away is more than float32 can lose. Elsewhere FP64 would cost time."""
    return bool(np.max(np.abs(model.intercept_)) > _FAR)


def _converter_of(operator: Any) -> Convert:  # noqa: ANN401 skl2onnx publishes no types
    """skl2onnx's own."""
    from skl2onnx.common._registration import get_converter  # noqa: PLC0415 slow, and only for conversions

    convert: Convert = get_converter(operator.type)
    return convert


def _gaussians(scope: Any, operator: Any, container: Any) -> None:  # noqa: ANN401 skl2onnx publishes no types
    """The class, or component, under whose normal distribution a row is most likely."""
    writer = _Writer(scope, operator, container)
    rows = writer.rows()
    logs = []
    for mean, whitening, constant in _GAUSSIANS[type(writer.estimator)](writer.estimator):
        white = writer.node("MatMul" if whitening.ndim > 1 else "Mul", writer.node("Sub", rows, mean), whitening)
        squares = writer.node("ReduceSum", writer.node("Mul", white, white), np.array([1]), keepdims=1)
        logs.append(writer.node("Add", writer.node("Mul", squares, -0.5), constant))
    scores = writer.node("Concat", *logs, axis=1)
    index = writer.node("ArgMax", scores, axis=1, keepdims=0)
    if hasattr(writer.estimator, "classes_"):
        writer.labels(index)
    else:
        writer.give(0, index)
    writer.give(1, writer.node("Softmax", scores, axis=1))


_Gaussian = tuple[NDArray[np.float64], NDArray[np.float64], float]
"""The mean, what makes rows standard normal (a matrix, or a factor for each column), and the logarithm at the mean."""


def _naive_gaussians(model: GaussianNB) -> Iterator[_Gaussian]:
    for mean, variance, prior in zip(model.theta_, model.var_, model.class_prior_, strict=True):
        yield mean, variance**-0.5, np.log(prior) - 0.5 * np.log(variance).sum()


def _quadratic_gaussians(model: QuadraticDiscriminantAnalysis) -> Iterator[_Gaussian]:
    parts = zip(model.means_, model.rotations_, model.scalings_, model.priors_, strict=True)
    for mean, rotation, variance, prior in parts:
        yield mean, rotation * variance**-0.5, np.log(prior) - 0.5 * np.log(variance).sum()


def _mixed_gaussians(model: GaussianMixture) -> Iterator[_Gaussian]:
    count, width = model.means_.shape
    factors = model.precisions_cholesky_
    if model.covariance_type == "tied":
        factors = np.broadcast_to(factors, (count, width, width))
    if model.covariance_type == "spherical":
        factors = np.repeat(factors[:, None], width, axis=1)
    for mean, factor, weight in zip(model.means_, factors, model.weights_, strict=True):
        diagonal = factor if factor.ndim == 1 else np.diag(factor)
        yield mean, factor, np.log(weight) + np.log(diagonal).sum()


_GAUSSIANS: dict[type, Callable[[Any], Iterator[_Gaussian]]] = {
    GaussianMixture: _mixed_gaussians,
    GaussianNB: _naive_gaussians,
    QuadraticDiscriminantAnalysis: _quadratic_gaussians,
}


def _principal_components(scope: Any, operator: Any, container: Any) -> None:  # noqa: ANN401 skl2onnx publishes no types
    writer = _Writer(scope, operator, container)
    model = writer.estimator
    found = writer.node("MatMul", writer.node("Sub", writer.rows(), model.mean_), model.components_.T)
    if model.whiten:
        deviations = np.sqrt(model.explained_variance_)
        found = writer.node("Div", found, np.maximum(deviations, np.finfo(deviations.dtype).eps))
    writer.give(0, found)


def _one_hot(scope: Any, operator: Any, container: Any) -> None:  # noqa: ANN401 skl2onnx publishes no types
    """skl2onnx takes numbers for integers, and so 2.7 for the category 2; that of texts and integers is right."""
    writer = _Writer(scope, operator, container)
    encoder = writer.estimator
    floats = [type(value.type).__name__ in {"FloatTensorType", "DoubleTensorType"} for value in operator.inputs]
    if not any(floats):
        _converter_of(operator)(scope, operator, container)
        return
    columns = [
        (writer.node("Gather", value.full_name, np.array([column]), axis=1), is_float)
        for value, is_float in zip(operator.inputs, floats, strict=True)
        for column in range(value.type.shape[1])
    ]
    found = []
    for index, ((column, is_float), categories) in enumerate(zip(columns, encoder.categories_, strict=True)):
        drop = None if encoder.drop_idx_ is None else encoder.drop_idx_[index]
        kept = categories if drop is None else np.delete(categories, drop)
        found.append(_numeric_column(writer, column, kept) if is_float else _exact_column(writer, column, kept))
    writer.give(0, writer.node("Concat", *found, axis=1))


def _numeric_column(writer: _Writer, column: str, categories: Any) -> str:  # noqa: ANN401 an array
    known = np.asarray(categories, np.float64)
    numbers = writer.node("Cast", column, to=TensorProto.DOUBLE)
    same = writer.node("Equal", numbers, known[None])
    if np.isnan(known).any():
        is_nan = writer.node("Cast", writer.node("IsNaN", numbers), to=TensorProto.DOUBLE)
        marked = writer.node("Mul", is_nan, np.isnan(known)[None].astype(np.float64))
        same = writer.node("Or", same, writer.node("Cast", marked, to=TensorProto.BOOL))
    return writer.node("Cast", same, to=TensorProto.FLOAT)


def _exact_column(writer: _Writer, column: str, categories: Any) -> str:  # noqa: ANN401 an array
    texts = [value.encode() for value in categories if isinstance(value, str)]
    known = {"cats_strings": texts} if texts else {"cats_int64s": [int(value) for value in categories]}
    encoded = writer.node("OneHotEncoder", column, domain="ai.onnx.ml", zeros=1, **known)
    return writer.node("Reshape", encoded, np.array([-1, len(categories)]))


def _boosted_trees(scope: Any, operator: Any, container: Any) -> None:  # noqa: ANN401 skl2onnx publishes no types
    """skl2onnx forgets that the trees of some losses give the logarithm of the prediction."""
    convert = _converter_of(operator)
    if operator.raw_operator.loss not in {"gamma", "poisson"}:
        convert(scope, operator, container)
        return
    logarithm = scope.get_unique_variable_name("logarithm")
    given = operator.outputs[0]
    inner = SimpleNamespace(full_name=logarithm, raw_name=logarithm, type=given.type)
    parts = {
        "raw_operator": operator.raw_operator,
        "inputs": operator.inputs,
        "outputs": [inner],
        "type": operator.type,
    }
    convert(
        scope,
        SimpleNamespace(**parts, output_full_names=[logarithm], input_full_names=operator.input_full_names),
        container,
    )
    _Writer(scope, operator, container).node("Exp", logarithm, output=given.full_name)


def _imputer(scope: Any, operator: Any, container: Any) -> None:  # noqa: ANN401 skl2onnx publishes no types
    """Texts on the wire are never missing: there is nothing to put in."""
    texts = type(operator.inputs[0].type).__name__ == "StringTensorType"
    if not texts or isinstance(operator.raw_operator.missing_values, str):
        _converter_of(operator)(scope, operator, container)
        return
    writer = _Writer(scope, operator, container)
    columns = [value.full_name for value in operator.inputs]
    writer.give(0, columns[0] if len(columns) == 1 else writer.node("Concat", *columns, axis=1))


OPERATORS: dict[type, Convert] = {
    **dict.fromkeys((MaxAbsScaler, MinMaxScaler, RobustScaler, StandardScaler), _scaler),
    **dict.fromkeys(_GAUSSIANS, _gaussians),
    **dict.fromkeys((IncrementalPCA, PCA), _principal_components),
    **dict.fromkeys((KMeans, MiniBatchKMeans), _k_means),
    HistGradientBoostingRegressor: _boosted_trees,
    **dict.fromkeys((ElasticNet, ElasticNetCV, Lasso, LassoCV, LinearRegression, Ridge, RidgeCV), _linear),
    **dict.fromkeys((LogisticRegression, LogisticRegressionCV), _logistic),
    LinearDiscriminantAnalysis: _linear_discriminant,
    Normalizer: _normalizer,
    OneHotEncoder: _one_hot,
    SimpleImputer: _imputer,
}
"""For skl2onnx, which otherwise knows them by its own converters."""
