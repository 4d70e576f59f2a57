"""The response cache: equal requests meet, others never do, and it stays within its bytes."""

from collections import OrderedDict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.inference.inference import Parameter
from penstock.inference.response_cache import ENTRY_BYTES, Key, ResponseCache, key
from penstock.inference.tensors import Array

F4 = np.float32


def strings(*elements: str | bytes) -> Array:
    array = np.empty(len(elements), object)
    array[:] = elements
    return array


DIFFERENT: list[tuple[str, dict[str, Array], list[str], dict[str, Parameter]]] = [
    ("v1", {"x": np.zeros(4, F4)}, ["y"], {}),
    ("v2", {"x": np.zeros(4, F4)}, ["y"], {}),
    ("v1", {"z": np.zeros(4, F4)}, ["y"], {}),
    ("v1", {"x": np.zeros(4, F4)}, ["y", "z"], {}),
    ("v1", {"x": np.zeros(4, F4)}, ["z", "y"], {}),
    ("v1", {"x": np.zeros(4, F4)}, ["yz"], {}),
    ("v1", {"x": np.zeros(4, F4)}, [], {}),
    ("v1", {"x": np.zeros((2, 2), F4)}, ["y"], {}),
    ("v1", {"x": np.zeros((4, 1), F4)}, ["y"], {}),
    ("v1", {"x": np.zeros(4, np.int32)}, ["y"], {}),
    ("v1", {"x": np.zeros(16, np.uint8)}, ["y"], {}),
    ("v1", {"x": np.array([0, 0, 0, 1], F4)}, ["y"], {}),
    ("v1", {"x": np.zeros(2, F4), "xx": np.zeros(2, F4)}, ["y"], {}),
    ("v1", {"x": np.zeros(0, F4)}, ["y"], {}),
    ("v1", {}, ["y"], {}),
    ("v1", {"x": strings("ab", "c")}, ["y"], {}),
    ("v1", {"x": strings("a", "bc")}, ["y"], {}),
    ("v1", {"x": strings("abc", "")}, ["y"], {}),
    ("v1", {"x": strings(b"ab", b"c")}, ["y"], {}),
    ("v1", {"x": strings("ab", b"c")}, ["y"], {}),
    ("v1", {"x": strings("abc")}, ["y"], {}),
    ("v1", {"x": strings("\ud800", "c")}, ["y"], {}),
    ("v1", {"x": np.zeros(4, F4)}, ["y"], {"p": 1}),
    ("v1", {"x": np.zeros(4, F4)}, ["y"], {"p": True}),
    ("v1", {"x": np.zeros(4, F4)}, ["y"], {"p": "1"}),
    ("v1", {"x": np.zeros(4, F4)}, ["y"], {"p": 1.0}),
]


def test_different_requests_have_different_keys() -> None:
    assert len({key(*request) for request in DIFFERENT}) == len(DIFFERENT)


def test_equal_requests_have_equal_keys() -> None:
    grid = np.arange(12, dtype=F4).reshape(3, 4)
    first = key("v", {"a": grid, "b": strings("x")}, ["y"])
    assert first == key("v", {"b": strings("x"), "a": grid.copy()}, ["y"], {})
    assert first == key("v", {"a": np.asfortranarray(grid), "b": strings("x")}, ["y"])
    assert first == key("v", {"a": np.repeat(grid, 2, axis=1)[:, ::2], "b": strings("x")}, ["y"])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_small_floats_have_keys_of_their_own(dtype: str) -> None:
    ml_dtypes = pytest.importorskip("ml_dtypes", reason="ml_dtypes is not installed")
    kind = getattr(ml_dtypes, dtype, np.float16)
    keys = {key("v", {"x": np.array(value, kind)}, ["y"]) for value in (0.0, 1.0, [0.0], [0.0, 1.0])}
    assert len(keys) == 4
    cache = ResponseCache(10**6)
    cache.put(key("v", {}, []), [np.array([1.0], kind)])
    assert cache.get(key("v", {}, [])) == (np.array([1.0], kind),)


texts = st.lists(st.text(max_size=3) | st.binary(max_size=3), max_size=4)


@given(st.tuples(texts, texts), st.tuples(texts, texts))
def test_strings_collide_only_if_they_are_equal(one: tuple[list[str], ...], other: tuple[list[str], ...]) -> None:
    keys = [key("v", {"a": strings(*a), "b": strings(*b)}, ["y"]) for a, b in (one, other)]
    assert (keys[0] == keys[1]) == (one == other)


def test_answers_are_read_only_copies() -> None:
    cache = ResponseCache(10**6)
    batch = np.arange(100, dtype=F4)
    where = key("v", {}, ["y", "s"])
    assert cache.get(where) is None
    cache.put(where, [batch[:2], strings("a", "b")])
    batch[:] = -1
    answer = cache.get(where)
    assert answer is not None
    assert [one.tolist() for one in answer] == [[0, 1], ["a", "b"]]
    for one in answer:
        assert one.base is None
        with pytest.raises(ValueError, match="read-only"):
            one[0] = one[1]
    assert (cache.hits, cache.misses, cache.evictions) == (1, 1, 0)


def test_what_is_larger_than_the_cache_is_not_kept_and_pushes_nothing_out() -> None:
    cache = ResponseCache(ENTRY_BYTES + 100)
    small, large = key("v", {}, ["small"]), key("v", {}, ["large"])
    cache.put(small, [np.zeros(100, np.uint8)])
    cache.put(large, [np.zeros(101, np.uint8)])
    assert (len(cache), cache.evictions) == (1, 0)
    assert cache.get(large) is None
    # An answer that has become too large does not leave its predecessor behind.
    cache.put(small, [np.zeros(101, np.uint8)])
    assert (len(cache), cache.bytes) == (0, 0)


def test_the_bytes_of_strings_count() -> None:
    cache = ResponseCache(10_000)
    cache.put(key("v", {}, ["y"]), [strings("x" * 20_000)])
    assert len(cache) == 0


def test_a_version_that_is_gone_leaves_nothing() -> None:
    cache = ResponseCache(10**6)
    for version in ("v1", "v2"):
        for number in range(3):
            cache.put(key(version, {"x": np.array(number)}, ["y"]), [np.zeros(1)])
    cache.drop("v1")
    cache.drop("v1")
    assert len(cache) == 3
    assert all(cache.get(key("v1", {"x": np.array(number)}, ["y"])) is None for number in range(3))
    cache.drop("v2")
    assert (len(cache), cache.bytes, cache._of_version) == (0, 0, {})


steps = st.lists(
    st.tuples(st.sampled_from(["get", "put", "drop"]), st.integers(0, 1), st.integers(0, 5), st.integers(0, 1200)),
    max_size=60,
)


@given(steps)
def test_it_behaves_like_the_plainest_cache(actions: list[tuple[str, int, int, int]]) -> None:
    capacity = 3 * ENTRY_BYTES
    cache = ResponseCache(capacity)
    model: OrderedDict[Key, int] = OrderedDict()
    counts = {"hits": 0, "misses": 0, "evictions": 0}
    for action, version, number, size in actions:
        where = Key(str(version), bytes([number]))
        if action == "get":
            found = cache.get(where)
            assert (None if found is None else found[0].nbytes) == model.get(where)
            counts["misses" if found is None else "hits"] += 1
            if where in model:
                model.move_to_end(where)
        elif action == "put":
            cache.put(where, [np.zeros(size, np.uint8)])
            model.pop(where, None)
            model[where] = size
            while sum(model.values()) + ENTRY_BYTES * len(model) > capacity:
                model.popitem(last=False)
                counts["evictions"] += 1
        else:
            cache.drop(str(version))
            for known in [known for known in model if known.version == str(version)]:
                del model[known]
        assert cache.bytes == sum(model.values()) + ENTRY_BYTES * len(model) <= capacity
        assert len(cache) == len(model)
    assert {name: getattr(cache, name) for name in counts} == counts
