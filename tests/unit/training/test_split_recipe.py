"""The split recipe, worked out again from the contract's words."""

import hashlib
import struct

from hypothesis import given
from hypothesis import strategies as st

from penstock.api.dataset.v1.dataset_pb2 import Split, SplitRecipe
from penstock.training.datasets.split import row_order, split_counts, split_range


@given(st.integers(0, 300), st.integers(0, 2**64 - 1))
def test_rows_are_sorted_by_the_digest_of_seed_and_number(row_count: int, seed: int) -> None:
    expected = sorted(range(row_count), key=lambda row: hashlib.sha256(struct.pack(">QQ", seed, row)).digest())

    assert row_order(row_count, seed).tolist() == expected


def test_the_order_does_not_depend_on_the_blocks_it_is_made_in() -> None:
    expected = sorted(range(70_000), key=lambda row: hashlib.sha256(struct.pack(">QQ", 9, row)).digest())

    assert row_order(70_000, 9).tolist() == expected


@given(st.integers(1, 10**7), st.floats(0.001, 1), st.floats(0, 1))
def test_the_splits_are_the_rounded_shares_and_share_out_every_row(row_count: int, train: float, part: float) -> None:
    validation = (1 - train) * part
    recipe = SplitRecipe(train=train, validation=validation, test=1 - train - validation)

    counts = split_counts(row_count, recipe)

    assert counts.train == round(train * row_count)
    assert abs(counts.validation - validation * row_count) <= 1
    ranges = [split_range(split, counts) for split in (Split.SPLIT_TRAIN, Split.SPLIT_VALIDATION, Split.SPLIT_TEST)]
    assert [row for each in ranges for row in (each.start, each.stop)] == [
        0,
        counts.train,
        counts.train,
        counts.train + counts.validation,
        counts.train + counts.validation,
        row_count,
    ]
    assert counts.test >= 0


def test_the_default_shares_of_a_hundred_and_fifty_rows() -> None:
    counts = split_counts(150, SplitRecipe(train=0.7, validation=0.15, test=0.15))

    # 0.15 × 150 is a half above 22: rounded to the even number.
    assert (counts.train, counts.validation, counts.test) == (105, 22, 23)
