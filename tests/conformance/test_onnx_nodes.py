"""ONNX's own node tests, each as a model that is loaded and asked through the wire.

What is excluded stands in `onnx_nodes_excluded.txt`, by name and with the reason: sequences, optionals and maps, which
the protocol does not have; datatypes that it does not have; and what ONNX Runtime itself does not compute.
"""

import warnings
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import pytest_asyncio
from onnx.backend.test.loader import load_model_tests
from tests.integration.inference.fleet import Inference, folder_server

from penstock.inference.tensors import DATATYPES, decode_raw, encode_raw
from penstock.oip import inference_pb2 as pb

pytestmark = pytest.mark.asyncio(loop_scope="module")

with warnings.catch_warnings():
    # The cases are computed when they are loaded, infinities and all.
    warnings.simplefilter("ignore", RuntimeWarning)
    CASES = {case.name: case for case in load_model_tests(kind="node")}

EXCLUDED = dict(
    line.split("  ", 1)
    for line in Path(__file__).with_name("onnx_nodes_excluded.txt").read_text(encoding="utf-8").splitlines()
)
SERVED = sorted(CASES.keys() - EXCLUDED.keys())
_NAMES = {datatype.dtype: name for name, datatype in DATATYPES.items()}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Inference]:
    """A server with an empty folder. Rows of ones, which a warm-up would send, many of these models refuse."""
    folder = tmp_path_factory.mktemp("models")
    async with folder_server(
        folder, tmp_path_factory.mktemp("home"), "grpcio", mode="explicit", warm_up=False, intra_op_threads=1
    ) as inference:
        yield inference


@pytest.mark.parametrize("name", SERVED)
async def test_a_node(server: Inference, name: str) -> None:
    case = CASES[name]
    load = pb.RepositoryModelLoadRequest(model_name=name)
    load.parameters["config"].string_param = "{}"
    load.parameters["file:1/model.onnx"].bytes_param = case.model.SerializeToString()
    await server.oip.RepositoryModelLoad(load)
    try:
        for inputs, outputs in case.data_sets:
            response = await server.oip.ModelInfer(_request(name, case.model, inputs))
            assert [output.name for output in response.outputs] == [output.name for output in case.model.graph.output]
            for output, raw, expected in zip(response.outputs, response.raw_output_contents, outputs, strict=True):
                answered = decode_raw(DATATYPES[output.datatype], list(output.shape), raw)
                _check(answered, _array(expected), case)
    finally:
        await server.oip.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name=name))


@pytest.mark.parametrize("name", sorted(EXCLUDED))
async def test_what_is_excluded_is_excluded_for_its_reason(name: str) -> None:
    """An exclusion that a new version of ONNX Runtime makes unnecessary has to go."""
    model, reason = CASES[name].model, EXCLUDED[name]
    values = [*model.graph.input, *model.graph.output]
    if reason.startswith("type "):
        assert any(value.type.WhichOneof("value") in reason for value in values)
    elif reason.startswith("datatype "):
        names = {onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type) for value in values}
        assert reason.removeprefix("datatype ") in names
    elif reason.startswith("refused"):
        with pytest.raises(Exception, match="ONNXRuntimeError"):
            _session(model)
    else:
        assert reason.startswith("differs: ")
        with pytest.raises(Exception, match=r"Mismatched|mismatch|ONNXRuntimeError|shape"):
            _compare_in_process(CASES[name])


def _session(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _compare_in_process(case: Any) -> None:
    session = _session(case.model)
    for inputs, outputs in case.data_sets:
        names = [value.name for value in case.model.graph.input]
        given = {name: _array(array) for name, array in zip(names, inputs, strict=False)}
        for answered, expected in zip(session.run(None, given), outputs, strict=True):
            _check(answered, _array(expected), case)


def _request(name: str, model: onnx.ModelProto, inputs: list[Any]) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=name)
    for value, given in zip(model.graph.input, inputs, strict=True):
        array = _array(given)
        datatype = DATATYPES["BYTES" if array.dtype == object else _NAMES[array.dtype]]
        request.inputs.add(name=value.name, datatype=datatype.name, shape=array.shape)
        request.raw_input_contents.append(bytes(encode_raw(datatype, array)))
    return request


def _array(given: Any) -> np.ndarray:
    """A case's tensor; its texts as the objects they are to ONNX."""
    array = onnx.numpy_helper.to_array(given) if isinstance(given, onnx.TensorProto) else np.asarray(given)
    return array.astype(object) if array.dtype.kind in "US" else array


def _check(answered: np.ndarray, expected: np.ndarray, case: Any) -> None:
    assert answered.shape == expected.shape
    if expected.dtype == object:
        assert answered.tolist() == expected.tolist()
        return
    assert answered.dtype == expected.dtype
    if expected.dtype == ml_dtypes.bfloat16:
        answered, expected = answered.astype(np.float32), expected.astype(np.float32)
    np.testing.assert_allclose(answered, expected, rtol=case.rtol, atol=case.atol)
