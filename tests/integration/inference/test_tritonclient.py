"""Triton's own Python client, unchanged, against the inference service."""

import asyncio
from collections.abc import AsyncIterator

import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tests.integration.inference import graphs
from tests.integration.inference.fleet import Registry, inference_server
from tritonclient.utils import InferenceServerException

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)
LARGE = 8_000_000


def given(name: str, array: np.ndarray, datatype: str) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(
    tmp_path_factory: pytest.TempPathFactory, transport: str
) -> AsyncIterator[triton.InferenceServerClient]:
    """The synchronous client; its calls go to threads, for the server may run on this loop."""
    registry = Registry(tmp_path_factory.mktemp("registry"))
    await registry.deploy(
        scale=[(await registry.add("scale", 1, graphs.scale(2)), 100)],
        words=[(await registry.add("words", 4, graphs.identity("BYTES", ["batch", 2])), 100)],
        large=[(await registry.add("large", 1, graphs.identity("UINT8", ["batch", LARGE])), 100)],
    )
    async with (
        registry.running() as port,
        inference_server(tmp_path_factory.mktemp("home"), port, transport, server_name="triton") as inference,
    ):
        await inference.settled()
        connected = triton.InferenceServerClient(inference.address)
        yield connected
        await asyncio.to_thread(connected.close)


async def test_health_and_metadata(client: triton.InferenceServerClient) -> None:
    def ask() -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready("scale")
        assert client.is_model_ready("words", "4")
        assert not client.is_model_ready("words", "5")
        assert not client.is_model_ready("nobody")
        server = client.get_server_metadata(as_json=True)
        assert server["name"] == "triton"
        assert {"binary_tensor_data", "model_repository", "statistics"} <= set(server["extensions"])
        assert client.get_model_metadata("scale", as_json=True) == {
            "name": "scale",
            "versions": ["1"],
            "platform": "onnxruntime_onnx",
            "inputs": [{"name": "rows", "datatype": "FP32", "shape": ["-1", "4"]}],
            "outputs": [
                {"name": "scaled", "datatype": "FP32", "shape": ["-1", "4"]},
                {"name": "total", "datatype": "FP32", "shape": ["-1", "1"]},
            ],
        }
        index = client.get_model_repository_index(as_json=True)["models"]
        assert [(one["name"], one["version"], one["state"]) for one in index] == [
            ("large", "1", "READY"),
            ("scale", "1", "READY"),
            ("words", "4", "READY"),
        ]

    await asyncio.to_thread(ask)


@pytest.mark.parametrize("rows", [ROWS, ROWS[:0]])
async def test_numbers(client: triton.InferenceServerClient, rows: np.ndarray) -> None:
    # Again and again, so that both ways to read a request are taken: with a known beginning, and the long one.
    for number, request_id in enumerate(["", "", "mine", "", ""]):
        result = await asyncio.to_thread(
            client.infer, "scale", [given("rows", rows + number, "FP32")], request_id=request_id
        )
        scaled = (rows + number) * 2
        np.testing.assert_array_equal(result.as_numpy("scaled"), scaled)
        np.testing.assert_array_equal(result.as_numpy("total"), scaled.sum(1, keepdims=True))
        assert result.get_response().id == request_id


async def test_a_large_tensor(client: triton.InferenceServerClient) -> None:
    array = np.random.default_rng(0).integers(0, 256, (1, LARGE), np.uint8)
    result = await asyncio.to_thread(client.infer, "large", [given("given", array, "UINT8")])
    np.testing.assert_array_equal(result.as_numpy("same"), array)


async def test_a_compressed_request(client: triton.InferenceServerClient) -> None:
    result = await asyncio.to_thread(client.infer, "scale", [given("rows", ROWS, "FP32")], compression_algorithm="gzip")
    np.testing.assert_array_equal(result.as_numpy("scaled"), ROWS * 2)


async def test_requested_outputs(client: triton.InferenceServerClient) -> None:
    rows, wanted = given("rows", ROWS, "FP32"), [triton.InferRequestedOutput("total")]
    result = await asyncio.to_thread(client.infer, "scale", [rows], model_version="1", outputs=wanted)
    assert result.as_numpy("scaled") is None
    assert result.as_numpy("total").shape == (2, 1)


async def test_strings(client: triton.InferenceServerClient) -> None:
    words = np.array([["grün", ""], ["a", "b" * 300]], np.object_)
    result = await asyncio.to_thread(client.infer, "words", [given("given", words, "BYTES")])
    assert [[text.decode() for text in row] for row in result.as_numpy("same")] == words.tolist()


async def test_an_unknown_model_reads_as_triton_clients_expect(client: triton.InferenceServerClient) -> None:
    with pytest.raises(InferenceServerException, match="Request for unknown model: 'nobody' is not found") as caught:
        await asyncio.to_thread(client.infer, "nobody", [given("rows", ROWS, "FP32")])
    assert caught.value.status() == "StatusCode.NOT_FOUND"


async def test_a_wrong_request_is_told_what_is_wrong(client: triton.InferenceServerClient) -> None:
    wrong = given("rows", ROWS.astype(np.int32), "INT32")
    with pytest.raises(InferenceServerException, match="input 'rows': expected FP32; got 'INT32'") as caught:
        await asyncio.to_thread(client.infer, "scale", [wrong])
    assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


async def test_the_asynchronous_client_and_its_stream(client: triton.InferenceServerClient) -> None:
    address = (
        client._channel.target if hasattr(client._channel, "target") else client._channel._channel.target().decode()
    )
    rows = given("rows", ROWS, "FP32")
    async with triton_aio.InferenceServerClient(address) as connected:
        result = await connected.infer("scale", [rows])
        np.testing.assert_array_equal(result.as_numpy("scaled"), ROWS * 2)

        async def requests() -> AsyncIterator[dict[str, object]]:
            for number in range(3):
                yield {"model_name": "scale", "inputs": [rows], "request_id": str(number)}

        answers = [answer async for answer in connected.stream_infer(requests())]
        assert [(result.get_response().id, error) for result, error in answers] == [
            ("0", None),
            ("1", None),
            ("2", None),
        ]
