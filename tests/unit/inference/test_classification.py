"""Classification: the largest elements as text, with their labels, as Triton writes them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from penstock.inference.classification import classify
from penstock.inference.tensors import Array
from penstock.rpc.errors import InvalidFieldError

NAN, INF = float("nan"), float("inf")
LABELS = ["cat", "dog", ""]


def floats(*rows: object) -> Array:
    return np.array(rows, np.float32)


@pytest.mark.parametrize(
    ("array", "count", "labels", "batched", "expected"),
    [
        (floats([0.1, 0.7, 0.2]), 2, LABELS, True, [["0.700000:1:dog", "0.200000:2"]]),
        (floats([1, 2], [4, 3]), 1, LABELS, True, [["2.000000:1:dog"], ["4.000000:0:cat"]]),
        (floats(5, 6, 7, 8), 2, LABELS, False, ["8.000000:3", "7.000000:2"]),
        (floats([1, 2], [4, 3]), 2, [], False, ["4.000000:2", "3.000000:3"]),
        # Of equal ones the lower index first; more than there are is all of them.
        (floats([3, 1, 3, 3]), 3, [], True, [["3.000000:0", "3.000000:2", "3.000000:3"]]),
        (floats([1, 2]), 2**62, [], True, [["2.000000:1", "1.000000:0"]]),
        (floats([NAN, -INF, 1]), 2, [], True, [["1.000000:2", "-inf:1"]]),
        (floats([NAN, NAN, 1]), 3, [], True, [["1.000000:2", "nan:0", "nan:1"]]),
        (np.array([[[1, 2], [9, 4]]], np.float64), 1, [], True, [["9.000000:2"]]),
        (np.array([[1, 2]], np.float16), 1, [], True, [["2.000000:1"]]),
        (np.array([[-128, 127]], np.int8), 2, LABELS, True, [["127:1:dog", "-128:0:cat"]]),
        (np.array([[0, 2**64 - 1]], np.uint64), 2, [], True, [[f"{2**64 - 1}:1", "0:0"]]),
        (np.float32(4), 3, LABELS, False, ["4.000000:0:cat"]),
        (floats(1, 2), 3, LABELS, True, [["1.000000:0:cat"], ["2.000000:0:cat"]]),
        (np.empty((0, 3), np.float32), 2, LABELS, True, []),
        (np.empty((2, 0), np.float32), 2, LABELS, True, [[], []]),
    ],
)
def test_table(array: Array, count: int, labels: list[str], batched: bool, expected: list[object]) -> None:
    answer = classify(np.asarray(array), count, labels, batched)
    assert answer.dtype == object
    assert answer.tolist() == expected


def test_bf16_counts_as_a_number() -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    array = np.array([[1, 3, 2]], ml_dtypes.bfloat16)
    assert classify(array, 2, [], True).tolist() == [["3.000000:1", "2.000000:2"]]


@pytest.mark.parametrize("count", [0, -1, -(2**63)])
def test_a_count_is_at_least_one(count: int) -> None:
    with pytest.raises(InvalidFieldError, match="at least 1"):
        classify(floats([1, 2]), count, [], True)


@pytest.mark.parametrize(("array", "name"), [(np.array([["a"]], object), "BYTES"), (np.array([[True]]), "BOOL")])
def test_only_numbers_have_an_order(array: Array, name: str) -> None:
    with pytest.raises(InvalidFieldError, match=name):
        classify(array, 1, [], True)


@given(
    npst.arrays(
        st.sampled_from([np.dtype("f4"), np.dtype("i1"), np.dtype("u8")]),
        npst.array_shapes(min_dims=2, max_dims=3, max_side=6),
        elements={"allow_nan": False},
    ),
    st.integers(1, 40),
)
def test_it_is_what_sorting_everything_gives(array: Array, count: int) -> None:
    answer = classify(array, count, [], True)
    for row, texts in zip(array.reshape(len(array), -1).tolist(), answer.tolist(), strict=True):
        order = sorted(range(len(row)), key=lambda index, row=row: (-row[index], index))[:count]
        assert [int(text.split(":")[1]) for text in texts] == order
