"""A scikit-learn estimator, or one that behaves like it, on its way to ONNX."""

import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import sklearn
from numpy.typing import NDArray
from sklearn.base import is_classifier, is_regressor
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted

from penstock.converters import naming
from penstock.converters.errors import ConversionError, UnsupportedModelError
from penstock.converters.gate import nodes_of
from penstock.converters.parity import Tensors
from penstock.converters.signature import Signature
from penstock.converters.sklearn_inputs import input_columns
from penstock.converters.sklearn_operators import OPERATORS
from penstock.converters.sklearn_options import check_steps, options_of, prepared
from penstock.converters.sklearn_steps import last_of
from penstock.converters.sklearn_trees import make_exact, threshold_rows
from penstock.converters.source import TEXT, SourceTensor

_OPSETS = {"": 18, "ai.onnx.ml": 3, "com.microsoft": 1}

LABELS = "labels"
"""The key of a graph's metadata under which the classes stand, a JSON array in the order of the probabilities."""


@dataclass(frozen=True)
class _Output:
    """An output of the graph, and how the estimator gives the same. `position` is where skl2onnx puts it."""

    tensor: SourceTensor
    position: int
    ask: Callable[[Any], Any]


class SklearnSource:
    """A fitted estimator or pipeline. Raises `UnsupportedModelError`.

    Its input is one matrix, `features` or `text`; of a ColumnTransformer that was fitted on a table, each column is an
    input. A classifier gives `label` and, where it has them, `probabilities`; a regressor `prediction`; a
    clusterer `label` and `distances`; an outlier detector `label`; a transformer `transformed`.
    """

    def __init__(self, estimator: Any) -> None:  # noqa: ANN401 scikit-learn publishes no types
        try:
            check_is_fitted(estimator)
        except NotFittedError as error:
            raise UnsupportedModelError(f"{type(estimator).__qualname__} is not fitted. Call fit first.") from error
        check_steps(estimator)
        self._estimator = estimator
        self._columns = input_columns(estimator)
        self._outputs = tuple(_outputs(estimator))
        self.inputs = tuple(column.tensor for column in self._columns)
        self.outputs = tuple(output.tensor for output in self._outputs)

    @property
    def name(self) -> str:
        return type(self._estimator).__name__

    @property
    def description(self) -> str:
        return f"scikit-learn {sklearn.__version__}"

    def answer(self, rows: Tensors) -> dict[str, NDArray[Any]]:
        given = self._given(rows)
        return {output.tensor.name: _shaped(output.tensor, output.ask(given)) for output in self._outputs}

    def random_rows(self, shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, NDArray[Any]]:
        """Numbers near where the estimator was trained; categories and words that it has seen."""
        random = np.random.default_rng(seed)
        return {column.tensor.name: column.draw(random, tuple(shapes[column.tensor.name])) for column in self._columns}

    def close(self) -> None:
        """Nothing runs."""

    def own_rows(self) -> Mapping[str, Tensors]:
        """Numbers at the thresholds of trees: there float32 and float64 go different ways."""
        ties = threshold_rows(self._estimator)
        return {} if ties is None else {"tie": {self.inputs[0].name: ties}}

    def to_onnx(self, signature: Signature) -> onnx.ModelProto:
        graph = self._converted()
        _set_locale(graph)
        make_exact(graph, self._estimator)
        inputs = [value.name for value in graph.graph.input]
        outputs = [graph.graph.output[output.position].name for output in self._outputs]
        finished = naming.finish(graph, signature, inputs, outputs, self.name)
        if is_classifier(self._estimator):
            labels = json.dumps([_plain(label) for label in self._estimator.classes_], ensure_ascii=False)
            onnx.helper.set_model_props(finished, {LABELS: labels})
        return finished

    def _converted(self) -> onnx.ModelProto:
        from skl2onnx import convert_sklearn  # noqa: PLC0415 slow, and only for this
        from skl2onnx.common.data_types import (  # noqa: PLC0415
            DoubleTensorType,
            FloatTensorType,
            Int64TensorType,
            StringTensorType,
        )

        estimator = prepared(self._estimator)
        types = {
            TEXT: StringTensorType,
            "float32": FloatTensorType,
            "float64": DoubleTensorType,
            "int64": Int64TensorType,
        }
        initial = [
            (column.tensor.name, types[column.tensor.dtype]([None, column.tensor.shape[1]])) for column in self._columns
        ]
        try:
            with warnings.catch_warnings(action="ignore"):  # of what skl2onnx itself does; users can change nothing
                return convert_sklearn(
                    estimator,
                    self.name,
                    initial_types=initial,
                    target_opset=_OPSETS,
                    options=options_of(estimator),
                    custom_conversion_functions=OPERATORS,
                )
        except ConversionError:
            raise
        except Exception as error:  # skl2onnx raises whatever its converter raised
            cause = (str(error).splitlines() or [type(error).__name__])[0][:300]
            cause = re.sub(r"\s*You may raise an is+ue at \S+", "", cause).rstrip(". ")
            steps = " → ".join(type(step).__name__ for _, step in getattr(self._estimator, "steps", ()))
            raise UnsupportedModelError(
                f"skl2onnx cannot convert {steps or self.name}: {cause}. Replace the step, or serve the estimator as a "
                "Python model."
            ) from error

    def _given(self, rows: Tensors) -> Any:  # noqa: ANN401 an array, a list or a table
        first = self._columns[0]
        if not first.is_of_table:
            array = rows[first.tensor.name]
            return array[:, 0] if first.is_document else self._precise(array)
        import pandas as pd  # noqa: PLC0415 who fitted on a table has it

        return pd.DataFrame(
            {column.tensor.name: self._precise(rows[column.tensor.name][:, 0]) for column in self._columns}
        )

    def _precise(self, array: NDArray[Any]) -> NDArray[Any]:
        """The float32 numbers in the type of the fit: mostly float64, and KMeans takes no other than its own."""
        centers = getattr(last_of(self._estimator), "cluster_centers_", None)
        return array.astype(np.float64 if centers is None else centers.dtype) if array.dtype.kind == "f" else array


def _outputs(estimator: Any) -> list[_Output]:  # noqa: ANN401 scikit-learn publishes no types
    last, name = last_of(estimator), type(estimator).__qualname__
    label = SourceTensor("label", "int64", (None,))
    if is_classifier(estimator):
        return _classified(estimator)
    if is_regressor(estimator) or type(last).__name__.endswith("Ranker"):
        return [_Output(SourceTensor("prediction", "float32", (None, 1)), 0, estimator.predict)]
    if hasattr(last, "cluster_centers_") and hasattr(estimator, "transform"):
        distances = SourceTensor("distances", "float32", (None, len(last.cluster_centers_)))
        return [_Output(label, 0, estimator.predict), _Output(distances, 1, estimator.transform)]
    if hasattr(last, "weights_") and hasattr(estimator, "predict_proba"):
        probabilities = SourceTensor("probabilities", "float32", (None, len(last.weights_)))
        return [_Output(label, 0, estimator.predict), _Output(probabilities, 1, estimator.predict_proba)]
    if hasattr(estimator, "predict"):
        return [_Output(SourceTensor("label", "int64", (None, 1)), 0, estimator.predict)]
    if hasattr(estimator, "transform"):
        width = len(estimator.get_feature_names_out()) if hasattr(estimator, "get_feature_names_out") else None
        return [_Output(SourceTensor("transformed", "float32", (None, width)), 0, estimator.transform)]
    raise UnsupportedModelError(
        f"{name} has neither predict nor transform as it was fitted: it says nothing of rows that it has not seen. "
        "Take an estimator that does, KMeans or LocalOutlierFactor(novelty=True)."
    )


def _classified(estimator: Any) -> list[_Output]:  # noqa: ANN401 scikit-learn publishes no types
    if isinstance(estimator.classes_, list) or np.ndim(estimator.classes_) > 1:
        raise UnsupportedModelError(
            f"{type(estimator).__qualname__} gives {len(estimator.classes_)} labels a row; an ONNX classifier gives "
            "one. Fit and convert a classifier for each."
        )
    classes = np.asarray(estimator.classes_)
    label = SourceTensor("label", TEXT if classes.dtype.kind in "OU" else "int64", (None,))
    if hasattr(estimator, "predict_proba"):
        label = replace(label, decided_by="probabilities")
    found = [_Output(label, 0, estimator.predict)]
    if label.decided_by:
        shape = (None, len(classes))
        found.append(_Output(SourceTensor("probabilities", "float32", shape), 1, estimator.predict_proba))
    return found


def _shaped(tensor: SourceTensor, answer: Any) -> NDArray[Any]:  # noqa: ANN401 dense or sparse
    array = np.asarray(answer.toarray() if hasattr(answer, "toarray") else answer)
    if len(tensor.shape) > array.ndim:
        array = array[:, None]
    return array.astype(tensor.numpy_dtype)


def _set_locale(model: onnx.ModelProto) -> None:
    """The default, en_US, is missing on slim images."""
    for node in nodes_of(model.graph):
        if node.op_type == "StringNormalizer":
            for attribute in [attribute for attribute in node.attribute if attribute.name == "locale"]:
                node.attribute.remove(attribute)
            node.attribute.append(onnx.helper.make_attribute("locale", "C.UTF-8"))


def _plain(label: Any) -> Any:  # noqa: ANN401 a numpy scalar, a string or a number
    return label.item() if isinstance(label, np.generic) else label
