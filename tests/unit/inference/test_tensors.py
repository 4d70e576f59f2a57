"""Tensors to the wire and back, whatever their datatype and shape."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from penstock.inference.tensors import (
    BF16,
    BYTES,
    DATATYPES,
    MAX_EMPTY_SPAN,
    Array,
    Datatype,
    TensorError,
    decode_raw,
    decode_typed,
    element_count,
    encode_raw,
)
from penstock.oip.inference_pb2 import InferTensorContents

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


@st.composite
def tensors(draw: st.DrawFn) -> tuple[Datatype, Array]:
    datatype = draw(st.sampled_from(list(DATATYPES.values())))
    if datatype is BF16:
        # hypothesis makes no such numbers; their bits are any 16.
        return datatype, draw(hnp.arrays(np.uint16, SHAPES)).view(BF16.dtype)
    elements = st.text(max_size=8) if datatype is BYTES else None
    return datatype, draw(hnp.arrays(datatype.dtype, SHAPES, elements=elements))


@given(tensors())
def test_raw_round_trip(tensor: tuple[Datatype, Array]) -> None:
    datatype, array = tensor
    raw = encode_raw(datatype, array)
    back = decode_raw(datatype, array.shape, raw)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    if datatype is not BF16:
        # numpy does not take two of its NaNs for equal; the bytes tell.
        np.testing.assert_array_equal(back, array)
    assert encode_raw(datatype, back) == raw


@given(tensors())
def test_typed_round_trip(tensor: tuple[Datatype, Array]) -> None:
    datatype, array = tensor
    if datatype.contents is None:
        return
    values = [value.encode() for value in array.ravel()] if datatype is BYTES else array.ravel().tolist()
    contents = InferTensorContents(**{datatype.contents: values})
    back = decode_typed(datatype, array.shape, contents)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    np.testing.assert_array_equal(back, array)


@given(tensors(), st.binary(max_size=64))
def test_any_bytes_become_a_tensor_of_their_shape_or_an_error(tensor: tuple[Datatype, Array], data: bytes) -> None:
    datatype, array = tensor
    try:
        back = decode_raw(datatype, array.shape, data)
    except TensorError:
        return
    assert (back.dtype, back.shape) == (array.dtype, array.shape)


@pytest.mark.parametrize("transform", [np.asfortranarray, lambda array: array[::-1], lambda array: array.astype(">f4")])
def test_what_is_not_contiguous_or_little_endian_is_written_as_if_it_were(transform: object) -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    changed = transform(array)  # type: ignore[operator]  # the table above holds functions
    np.testing.assert_array_equal(
        decode_raw(DATATYPES["FP32"], (2, 3), encode_raw(DATATYPES["FP32"], changed)), changed
    )


def test_decoding_raw_numbers_copies_nothing() -> None:
    data = bytes(64)
    array = decode_raw(DATATYPES["FP32"], (4, 4), data)
    assert np.shares_memory(array, np.frombuffer(data, np.uint8))


@pytest.mark.parametrize("shape", [(-1,), (2, -1, 0), (-(2**63), 2), (0, MAX_EMPTY_SPAN + 1), (2**62, 0, 2)])
def test_shapes_that_are_none(shape: tuple[int, ...]) -> None:
    with pytest.raises(TensorError):
        element_count(shape)


@pytest.mark.parametrize(("shape", "count"), [((), 1), ((0,), 0), ((0, MAX_EMPTY_SPAN), 0), ((2**40, 2**40), 2**80)])
def test_elements_are_counted_without_overflow(shape: tuple[int, ...], count: int) -> None:
    assert element_count(shape) == count
