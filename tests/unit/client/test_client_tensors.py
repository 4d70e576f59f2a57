"""numpy arrays to the wire and back."""

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from penstock.client.tensors import DTYPES, decode_tensor, encode_tensor
from penstock.oip import inference_pb2 as pb

SHAPES = hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4)


def there_and_back(array: np.ndarray) -> np.ndarray:
    description, raw = encode_tensor("x", array)
    fields = {"name": "x", "datatype": description.datatype, "shape": description.shape}
    return decode_tensor(pb.ModelInferResponse.InferOutputTensor(**fields), raw)


@given(st.data(), st.sampled_from(sorted(DTYPES)), SHAPES, st.sampled_from("<>"))
def test_numbers_survive_in_either_byte_order(data: st.DataObject, datatype: str, shape: tuple[int, ...], order: str):
    dtype = DTYPES[datatype].newbyteorder(order)
    array = data.draw(hnp.arrays(dtype, shape))
    result = there_and_back(array)
    assert result.dtype == DTYPES[datatype]
    np.testing.assert_array_equal(result, array)


@given(hnp.arrays(object, SHAPES, elements=st.binary(max_size=9), fill=st.nothing()))
def test_bytes_survive(array: np.ndarray):
    result = there_and_back(array)
    assert result.shape == array.shape
    assert result.tolist() == array.tolist()


def test_text_travels_as_utf_8():
    assert there_and_back(np.array(["grün", ""])).tolist() == ["grün".encode(), b""]


def test_an_array_that_is_not_contiguous_keeps_its_order():
    array = np.arange(6, dtype=np.int32).reshape(2, 3).T
    np.testing.assert_array_equal(there_and_back(array), array)


@pytest.mark.parametrize("dtype", ["c8", "M8[s]", "V3"])
def test_a_dtype_the_protocol_lacks_is_refused_by_name(dtype: str):
    with pytest.raises(TypeError, match=r"Input 'x': dtype .* has no datatype"):
        encode_tensor("x", np.zeros(1, dtype))


def test_a_bytes_element_that_ends_too_late_is_refused():
    output = pb.ModelInferResponse.InferOutputTensor(name="x", datatype="BYTES", shape=[1])
    with pytest.raises(ValueError, match="BYTES element of 9 bytes ends after the tensor's 7"):
        decode_tensor(output, struct.pack("<I", 9) + b"abc")


@pytest.mark.parametrize(
    ("element", "error", "told"),
    [
        (5, TypeError, "expected str or bytes"),
        (10**12, TypeError, "int"),
        (None, TypeError, "NoneType"),
        ("\ud800", ValueError, "UTF-8"),
    ],
)
def test_an_element_that_is_neither_text_nor_bytes_is_refused(element: object, error: type[Exception], told: str):
    """Five is not five zero bytes, and a large number not as many as the memory has."""
    with pytest.raises(error, match=told):
        encode_tensor("words", np.array([element], object))
