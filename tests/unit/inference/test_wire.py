"""Messages taken apart and put together by hand are what protobuf's own reader and writer make of them."""

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import given
from hypothesis import strategies as st

from penstock.inference import wire
from penstock.inference.wire import LARGE_BYTES, raw_output_parts, read_infer_request, stream_parts
from penstock.oip import inference_pb2 as pb

RAW = st.lists(st.binary(max_size=300), max_size=4)


def request_of(raw: list[bytes], name: str = "m") -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=name, id="i", raw_input_contents=raw)
    request.parameters["mine"].int64_param = -1
    for index in range(len(raw)):
        request.inputs.add(name=str(index), datatype="UINT8", shape=[len(raw[index])])
    return request


@given(raw=RAW)
def test_a_large_request_is_read_as_protobuf_reads_it(raw: list[bytes]) -> None:
    request = request_of([*raw, bytes(LARGE_BYTES)])
    read = read_infer_request(request.SerializeToString())
    assert [bytes(contents) for contents in read.raw] == list(request.raw_input_contents)
    request.ClearField("raw_input_contents")
    assert read.message == request


@given(raw=RAW)
def test_a_small_request_too(raw: list[bytes]) -> None:
    request = request_of(raw)
    read = read_infer_request(request.SerializeToString())
    assert [bytes(contents) for contents in read.raw] == raw
    assert read.message == request


def test_the_raw_contents_of_a_large_request_are_not_copied() -> None:
    data = request_of([bytes(LARGE_BYTES)]).SerializeToString()
    (contents,) = read_infer_request(data).raw
    assert np.shares_memory(np.frombuffer(contents, np.uint8), np.frombuffer(data, np.uint8))


@given(junk=st.binary(min_size=1, max_size=60), at=st.integers(0, 60))
def test_any_bytes_are_a_request_or_a_decode_error(junk: bytes, at: int) -> None:
    whole = request_of([bytes(LARGE_BYTES)]).SerializeToString()
    data = whole[:at] + junk + whole[at + len(junk) :]
    try:
        read = read_infer_request(data)
    except DecodeError:
        return
    assert sum(map(len, read.raw)) <= len(data)


@pytest.mark.parametrize("cut", [1, 2, 100, LARGE_BYTES // 2])
def test_a_cut_off_request_is_a_decode_error(cut: int) -> None:
    data = request_of([bytes(2 * LARGE_BYTES)]).SerializeToString()
    with pytest.raises(DecodeError):
        read_infer_request(data[:-cut])


@given(raw=RAW)
def test_responses_are_what_protobuf_would_write(raw: list[bytes]) -> None:
    response = pb.ModelInferResponse(model_name="m", id="i")
    parts = [response.SerializeToString(), *raw_output_parts(raw)]
    response.raw_output_contents.extend(raw)
    assert pb.ModelInferResponse.FromString(b"".join(parts)) == response
    streamed = pb.ModelStreamInferResponse(infer_response=response)
    assert pb.ModelStreamInferResponse.FromString(b"".join(stream_parts(parts))) == streamed


@given(value=st.integers(0, 2**64 - 1))
def test_numbers_are_written_as_they_are_read(value: int) -> None:
    written = wire.varint(value)
    assert wire._read_varint(memoryview(written), 0) == (value, len(written))
