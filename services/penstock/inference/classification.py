"""The output parameter `classification: k`: the k largest elements instead of the tensor (Triton's extension)."""

import math
from collections.abc import Sequence

import numpy as np

from penstock.inference.tensors import Array
from penstock.rpc.errors import InvalidFieldError


def classify(array: Array, count: int, labels: Sequence[str], batched: bool) -> Array:
    """The largest elements of each row as `value:index[:label]`, largest first, of equal ones the lower index first.

    `array` is [rows, …] if `batched`, else one row; an index counts through the flattened row. The answer is an object
    array of `str`, [rows, k] or [k], k being `count` or the row's size if that is smaller. An index without a label,
    or with an empty one, has none. NaN comes last. Values look as Triton writes them: floats with six decimals.

    Raises `InvalidFieldError` for a count below 1, or elements that have no order.
    """
    if count < 1:
        raise InvalidFieldError.of("classification", f"expected a count of at least 1; got {count}")
    if array.dtype in (np.dtype(object), np.dtype(np.bool_)):
        datatype = "BOOL" if array.dtype == np.bool_ else "BYTES"
        raise InvalidFieldError.of("classification", f"expected an output of numbers; this one is {datatype}")
    rows, classes = (len(array), math.prod(array.shape[1:])) if batched else (1, array.size)
    table = array.reshape(rows, classes)
    kept = min(count, classes)
    answer = np.empty((rows, kept), object)
    if table.dtype.kind == "V":
        # BF16 is no dtype of numpy's own, which can neither sort nor format it.
        table = table.astype(np.float32)
    if answer.size:
        integers = table.dtype.kind in "iu"
        # Both turn the order round; the negative of an integer can overflow, its complement cannot.
        keys = ~table if integers else -table
        limits = np.partition(keys, kept - 1, axis=1)[:, kept - 1]
        form = "%d:%d" if integers else "%f:%d"
        for row in range(rows):
            answer[row] = _texts(form, table[row], _largest(keys[row], limits[row], kept), labels)
    return answer if batched else answer[0]


def _largest(keys: Array, limit: Array, kept: int) -> list[int]:
    """Indices of the smallest keys. Only those up to the `kept`-th smallest need sorting; there may be 100,000 more."""
    # Not `keys <= limit`: where the limit is NaN, that would leave nothing.
    candidates = np.flatnonzero(~(keys > limit))
    best: list[int] = candidates[np.argsort(keys[candidates], kind="stable")[:kept]].tolist()
    return best


def _texts(form: str, row: Array, indices: list[int], labels: Sequence[str]) -> list[str]:
    values = row[indices].tolist()
    names = (labels[index] if index < len(labels) else "" for index in indices)
    return [
        form % (value, index) + (f":{name}" if name else "")
        for value, index, name in zip(values, indices, names, strict=True)
    ]
