"""Checks of request fields."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.rpc.errors import InvalidFieldError
from penstock.rpc.validation import Violations, decode_page_token, encode_page_token, page_size, validating


def wrong(check: str, value: object, *rest: object) -> bool:
    violations = Violations()
    getattr(violations, check)("field", value, *rest)
    try:
        violations.raise_if_any()
    except InvalidFieldError:
        return True
    return False


@pytest.mark.parametrize(
    ("check", "right", "bad"),
    [
        ("name", ["a", "0", "a.b-c_d", "x" * 63], ["", "A", "-a", ".a", "x" * 64, "a/b", "a\n", "ä", "../a"]),
        ("request_id", ["", "a", "A-_9", "x" * 64], ["x" * 65, "a b", "a\n", "a.b"]),
        ("digest", ["sha256:" + "0a" * 32], ["", "0a" * 32, "sha256:" + "0A" * 32, "sha256:" + "0a" * 32 + "\n"]),
        ("text", ["", "x" * 1000], ["x" * 1001]),
    ],
)
def test_forms(check: str, right: list[str], bad: list[str]) -> None:
    assert [value for value in right if wrong(check, value)] == []
    assert [value for value in bad if not wrong(check, value)] == []


def test_bounds_are_inclusive_and_nan_is_outside() -> None:
    assert [value for value in (0, 1, 5, 9, 10, float("nan")) if wrong("within", value, 1, 9)][:2] == [0, 10]
    assert wrong("within", float("nan"), 1, 9)


def test_all_violations_are_collected() -> None:
    def check() -> None:
        with validating() as violations:
            violations.name("a", "")
            violations.text("b", "fine")
            violations.within("c", 5, 0, 1)

    with pytest.raises(InvalidFieldError) as caught:
        check()
    assert [violation.field for violation in caught.value.violations] == ["a", "c"]


@pytest.mark.parametrize(("asked", "given_"), [(0, 100), (1, 1), (1000, 1000)])
def test_page_sizes(asked: int, given_: int) -> None:
    violations = Violations()
    assert page_size(violations, asked) == given_
    violations.raise_if_any()


@pytest.mark.parametrize("asked", [-1, 1001])
def test_page_sizes_out_of_bounds(asked: int) -> None:
    violations = Violations()
    page_size(violations, asked)
    with pytest.raises(InvalidFieldError, match="page_size"):
        violations.raise_if_any()


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_page_tokens_come_back(key: str) -> None:
    violations = Violations()
    assert decode_page_token(violations, encode_page_token(key)) == key
    violations.raise_if_any()


@given(st.text())
def test_no_page_token_is_an_internal_error(token: str) -> None:
    violations = Violations()
    assert isinstance(decode_page_token(violations, token), str)


@pytest.mark.parametrize("token", ["!", "abc", "_w==", "é"])
def test_a_made_up_page_token_is_refused(token: str) -> None:
    violations = Violations()
    decode_page_token(violations, token)
    with pytest.raises(InvalidFieldError, match="page_token"):
        violations.raise_if_any()
