"""The inference service as an operator starts it, with either transport: Triton's client sees no difference."""

import queue
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tests.integration.inference import graphs
from tests.integration.inference.fleet import WAIT_S, put_model
from tests.integration.rpc.conformance import TRANSPORTS
from tritonclient.utils import InferenceServerException

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)


@pytest.fixture(scope="module", params=TRANSPORTS)
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder, ready = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("run") / "ready"
    put_model(folder, "scale", graphs.scale(2))
    put_model(folder, "lookup", graphs.lookup())
    put_model(folder, "large", graphs.identity("UINT8", ["batch", 8_000_000]))
    flags = ["--repository", folder, "--transport", request.param, "--port", "0", "--metrics-port", "0"]
    flags += ["--home", ready.parent, "--ready-file", ready, "--log-level", "warning"]
    process = subprocess.Popen([sys.executable, "-m", "penstock.cli", "serve", "inference", *flags])
    try:
        address = _address(process, ready)
        with triton.InferenceServerClient(address) as connected:
            _until_ready(connected)
            yield connected
    finally:
        process.terminate()
        assert process.wait(WAIT_S) == 0


def _address(process: "subprocess.Popen[bytes]", ready: Path) -> str:
    limit = time.monotonic() + WAIT_S
    while not ready.exists():
        assert process.poll() is None, "the server ended before it was ready"
        assert time.monotonic() < limit
        time.sleep(0.02)
    return ready.read_text(encoding="utf-8")


def _until_ready(client: Any) -> None:
    limit = time.monotonic() + WAIT_S
    while not client.is_server_ready():
        assert time.monotonic() < limit
        time.sleep(0.02)


def given(name: str, array: np.ndarray, datatype: str) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


def test_requests_by_plan_and_the_long_way(client: Any) -> None:
    for number, request_id in enumerate(["", "", "mine", "", ""]):
        rows = ROWS + number
        result = client.infer("scale", [given("rows", rows, "FP32")], request_id=request_id)
        np.testing.assert_array_equal(result.as_numpy("scaled"), rows * 2)
        np.testing.assert_array_equal(result.as_numpy("total"), (rows * 2).sum(1, keepdims=True))
        assert result.get_response().id == request_id


def test_large_tensors_and_gzip(client: Any) -> None:
    array = np.random.default_rng(0).integers(0, 256, (1, 8_000_000), np.uint8)
    result = client.infer("large", [given("given", array, "UINT8")])
    np.testing.assert_array_equal(result.as_numpy("same"), array)
    result = client.infer("scale", [given("rows", ROWS, "FP32")], compression_algorithm="gzip")
    np.testing.assert_array_equal(result.as_numpy("scaled"), ROWS * 2)


def test_an_error_has_its_status_and_its_text(client: Any) -> None:
    with pytest.raises(InferenceServerException, match="input 'rows': expected FP32; got 'INT32'") as caught:
        client.infer("scale", [given("rows", ROWS.astype(np.int32), "INT32")])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nobody' is not found"):
        client.infer("nobody", [given("rows", ROWS, "FP32")])


def test_a_stream_goes_on_after_an_error(client: Any) -> None:
    answers: queue.Queue[Any] = queue.Queue()
    client.start_stream(lambda result, error: answers.put(error or int(result.as_numpy("found")[0])))
    for index in (1, 99, 3):
        client.async_stream_infer("lookup", [given("index", np.array([index]), "INT64")])
    client.stop_stream()
    first, failed, last = [answers.get_nowait() for _ in range(3)]
    assert (first, last) == (10, 30)
    assert "could not compute" in str(failed)


def test_statistics_and_configuration(client: Any) -> None:
    before = client.get_inference_statistics("scale", as_json=True)["model_stats"][0]
    client.infer("scale", [given("rows", ROWS, "FP32")])
    after = client.get_inference_statistics("scale", as_json=True)["model_stats"][0]
    assert int(after["inference_count"]) - int(before["inference_count"]) == 2
    assert client.get_model_config("scale", as_json=True)["config"]["platform"] == "onnxruntime_onnx"
