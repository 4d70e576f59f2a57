"""Trees of scikit-learn: their exact splits, which the converter's float32 attributes blur, and rows that show it."""

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from penstock.converters.errors import UnsupportedModelError
from penstock.converters.gate import nodes_of
from penstock.converters.sklearn_boosters import splits_of
from penstock.converters.sklearn_steps import last_of, steps_of

MAX_TIES = 256
_ROUNDING = 2.0**-22
_LIGHTGBM_ZERO = np.float32(-1e-35)
"""LightGBM reads a number that is as small as this as zero, which is above it."""
_SCALERS = frozenset({"MaxAbsScaler", "MinMaxScaler", "RobustScaler", "StandardScaler"})


_Key = tuple[bytes, bytes]


@dataclass(frozen=True)
class Tree:
    """The nodes of a tree in order; leaves have a feature, too, that means nothing."""

    is_split: NDArray[np.bool_]
    feature: NDArray[np.int64]
    threshold: NDArray[np.float64]
    missing_go_left: NDArray[np.bool_]


def trees_of(estimator: Any) -> list[Tree]:  # noqa: ANN401 scikit-learn publishes no types
    """The trees of an estimator and of those inside it, in the order of the graph."""
    return [tree for step in steps_of(estimator) for tree in _trees(step)]


def threshold_rows(estimator: Any) -> NDArray[np.float32] | None:  # noqa: ANN401 scikit-learn publishes no types
    """Rows with one feature at a threshold of a tree, or the next number beside it; None where no tree sees them.

    Behind scalers, they are the rows that come out there.
    """
    steps = getattr(estimator, "steps", None)
    if steps is not None and len(steps) > 1:
        return _rows_before(estimator)
    inner = estimator if steps is None else steps[0][1]
    if any(hasattr(step, kind) for step in steps_of(inner) for kind in ("steps", "transformers_", "final_estimator_")):
        return None
    return _threshold_rows(inner)


def _rows_before(pipeline: Any) -> NDArray[np.float32] | None:  # noqa: ANN401 scikit-learn publishes no types
    ties = threshold_rows(pipeline[-1:])
    before = pipeline[:-1]
    if ties is None or any(type(step).__name__ not in _SCALERS for _, step in before.steps):
        return None
    rows: NDArray[np.float32] = before.inverse_transform(ties).astype(np.float32)
    return np.concatenate([rows, np.nextafter(rows, np.float32(np.inf)), np.nextafter(rows, np.float32(-np.inf))])


def _threshold_rows(estimator: Any) -> NDArray[np.float32] | None:  # noqa: ANN401 scikit-learn publishes no types
    known = [
        split
        for tree in trees_of(estimator)
        for split in zip(tree.feature[tree.is_split], tree.threshold[tree.is_split], strict=True)
    ]
    # A split that only tells NaN from numbers has an infinite threshold.
    splits = sorted({split for split in known + splits_of(estimator) if np.isfinite(split[1])})
    if not splits:
        return None
    random = np.random.default_rng(0)
    rows = []
    for index in random.permutation(len(splits))[: MAX_TIES // 3]:
        feature, threshold = splits[index]
        near = np.float32(threshold)
        for value in (np.nextafter(near, np.float32(-np.inf)), near, np.nextafter(near, np.float32(np.inf))):
            row = random.standard_normal(estimator.n_features_in_).astype(np.float32)
            row[feature] = value
            rows.append(row)
    return np.asarray(rows, np.float32)


def make_exact(model: onnx.ModelProto, estimator: Any) -> None:  # noqa: ANN401 scikit-learn publishes no types
    """Gives the graph's trees the thresholds and the way for NaN that the estimator's have.

    A float32 number is at most a float64 threshold if it is at most the threshold rounded down to float32; skl2onnx
    rounds to the nearest. Trees that do not round what they get to float32 see what a scaler makes in float64. What it
    cannot be sure of it leaves alone: the gate asks on rows at the thresholds.
    """
    nodes = [node for node in nodes_of(model.graph) if node.op_type.startswith("TreeEnsemble")]
    last = last_of(estimator)
    wide = hasattr(last, "_predictors") or type(last).__module__.partition(".")[0] == "lightgbm"
    doubles = _doubles_before_casts(model) if wide else {}
    if doubles:
        _raise_opset(model)
    if splits := [split for step in steps_of(estimator) for split in splits_of(step)]:
        for node in nodes:
            _set_thresholds(node, _booster_thresholds(node, splits), doubles)
    known: dict[_Key, list[Tree]] = defaultdict(list)
    for tree in trees_of(estimator):
        known[_key(tree.is_split, tree.feature)].append(tree)
    for node in nodes:
        parts = list(_parts(node))
        found = [one for part in parts if (one := _taken(known, *part)) is not None]
        if found and len(found) == len(parts):
            split = np.concatenate([tree.is_split for tree in found])
            left = np.concatenate([tree.missing_go_left for tree in found]) & split
            thresholds = np.concatenate([tree.threshold for tree in found])
            _set_thresholds(node, np.where(split, thresholds, 0.0), doubles)
            _replace(node, "nodes_missing_value_tracks_true", left.astype(np.int64).tolist())


def _key(split: NDArray[np.bool_], feature: NDArray[np.int64]) -> _Key:
    return split.tobytes(), feature[split].astype(np.int64).tobytes()


def _parts(node: onnx.NodeProto) -> Iterator[tuple[NDArray[np.bool_], NDArray[np.int64], NDArray[np.float64]]]:
    """What is a split, by which feature and at what threshold, of the nodes of each tree."""
    attributes = {attribute.name: attribute for attribute in node.attribute}
    if "nodes_values" not in attributes:
        return
    trees = np.asarray(attributes["nodes_treeids"].ints)
    split = np.asarray([mode == b"BRANCH_LEQ" for mode in attributes["nodes_modes"].strings])
    feature, threshold = np.asarray(attributes["nodes_featureids"].ints), np.asarray(attributes["nodes_values"].floats)
    starts = [0, *(np.flatnonzero(np.diff(trees)) + 1), len(trees)]
    for start, stop in pairwise(starts):
        yield split[start:stop], feature[start:stop], threshold[start:stop]


def _taken(
    known: Mapping[_Key, list[Tree]],
    split: NDArray[np.bool_],
    feature: NDArray[np.int64],
    threshold: NDArray[np.float64],
) -> Tree | None:
    """The tree of this form and about these thresholds. The trees of an ensemble may stand in another order."""
    trees = known.get(_key(split, feature), [])
    for index, tree in enumerate(trees):
        if np.allclose(tree.threshold[split], threshold[split], rtol=_ROUNDING, atol=0.0):
            return trees.pop(index)
    return None


def _doubles_before_casts(model: onnx.ModelProto) -> dict[str, str]:
    """The float64 tensors that are rounded to float32, by what they are then."""
    types = {
        value.name: value.type.tensor_type.elem_type
        for value in onnx.shape_inference.infer_shapes(model).graph.value_info
    }
    return {
        node.output[0]: node.input[0]
        for node in nodes_of(model.graph)
        if node.op_type == "Cast" and types.get(node.input[0]) == onnx.TensorProto.DOUBLE
    }


def _raise_opset(model: onnx.ModelProto) -> None:
    """Numbers of float64 are there since the third version of ONNX's operators for machine learning."""
    for entry in model.opset_import:
        if entry.domain == "ai.onnx.ml":
            entry.version = max(entry.version, 3)


def _set_thresholds(node: onnx.NodeProto, thresholds: NDArray[np.float64], doubles: Mapping[str, str]) -> None:
    if node.input[0] not in doubles:
        _replace(node, "nodes_values", _rounded_down(thresholds).tolist())
        return
    node.input[0] = doubles[node.input[0]]
    # Of float64 input, all numbers are tensors of float64.
    for attribute in [attribute for attribute in node.attribute if attribute.floats]:
        values = thresholds if attribute.name == "nodes_values" else np.asarray(attribute.floats, np.float64)
        node.attribute.remove(attribute)
        if attribute.name != "nodes_hitrates":
            tensor = onnx.numpy_helper.from_array(values, attribute.name)
            node.attribute.append(onnx.helper.make_attribute(f"{attribute.name}_as_tensor", tensor))


def _booster_thresholds(node: onnx.NodeProto, splits: list[tuple[int, float]]) -> NDArray[np.float64]:
    """The exact thresholds of a booster, whose nodes stand in the graph in another order than in itself."""
    exact = np.asarray([threshold for _, threshold in splits], np.float64)
    exact = np.where(exact.astype(np.float32) == _LIGHTGBM_ZERO, np.nextafter(_LIGHTGBM_ZERO, np.float32(-1)), exact)
    keys = [(feature, float(np.float32(threshold))) for feature, threshold in splits]
    known = dict(zip(keys, exact.tolist(), strict=True))
    modes = next(attribute for attribute in node.attribute if attribute.name == "nodes_modes").strings
    values = next(attribute for attribute in node.attribute if attribute.name == "nodes_values").floats
    return np.asarray(
        [
            known.get((feature, value), value) if mode == b"BRANCH_LEQ" else value
            for feature, value, mode in zip(_ints(node, "nodes_featureids"), values, modes, strict=True)
        ]
    )


def _trees(estimator: Any) -> Iterator[Tree]:  # noqa: ANN401 scikit-learn publishes no types
    if (tree := getattr(estimator, "tree_", None)) is not None:
        yield Tree(tree.children_left >= 0, tree.feature, tree.threshold, tree.missing_go_to_left.astype(np.bool_))
    for round_ in getattr(estimator, "_predictors", []):
        for predictor in round_:
            nodes = predictor.nodes
            if nodes["is_categorical"].any():
                raise UnsupportedModelError(
                    f"{type(estimator).__qualname__} splits by categories, which the ONNX trees that ONNX Runtime runs "
                    "fast cannot say. Fit it on encoded categories (OneHotEncoder), with categorical_features=None."
                )
            splits = nodes["is_leaf"] == 0
            yield Tree(splits, nodes["feature_idx"], nodes["num_threshold"], nodes["missing_go_to_left"] != 0)


def _rounded_down(thresholds: NDArray[np.float64]) -> NDArray[np.float32]:
    near = thresholds.astype(np.float32)
    below: NDArray[np.float32] = np.where(near > thresholds, np.nextafter(near, np.float32(-np.inf)), near)
    return below


def _ints(node: onnx.NodeProto, name: str) -> list[int]:
    return next((list(attribute.ints) for attribute in node.attribute if attribute.name == name), [])


def _replace(node: onnx.NodeProto, name: str, values: list[Any]) -> None:
    for attribute in [attribute for attribute in node.attribute if attribute.name == name]:
        node.attribute.remove(attribute)
    node.attribute.append(onnx.helper.make_attribute(name, values))
