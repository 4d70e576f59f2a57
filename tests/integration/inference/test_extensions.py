"""Triton's extensions of the protocol, through the wire, mostly with Triton's own client."""

import asyncio
import json
import os
import queue
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import ml_dtypes
import numpy as np
import pytest
import pytest_asyncio
import tritonclient.grpc as triton
from onnx import helper
from tests.integration.inference import graphs
from tests.integration.inference.fleet import Inference, folder_server, infer_request, put_model
from tritonclient.utils import InferenceServerException, shared_memory

from penstock.oip import inference_pb2 as pb
from penstock.oip import model_config_pb2 as mc

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)

COUNTDOWN = """
import numpy as np
class Model:
    def __init__(self, config):
        assert config["name"] == "countdown"
    def infer(self, inputs, parameters):
        for number in range(int(inputs["start"][0]), 0, -1):
            yield {"number": np.array([number], np.int32)}
"""

ACCUMULATOR = """
sequence_batching {
  control_input { name: "begins" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } }
  state { input_name: "before" output_name: "after" data_type: TYPE_FP32 dims: [1] }
}
max_batch_size: 8
input { name: "x" data_type: TYPE_FP32 dims: [1] }
output { name: "sum" data_type: TYPE_FP32 dims: [1] }
"""

TWICE = """
platform: "ensemble"
max_batch_size: 8
input { name: "rows" data_type: TYPE_FP32 dims: [4] }
output { name: "quadrupled" data_type: TYPE_FP32 dims: [4] }
ensemble_scheduling {
  step { model_name: "scale" model_version: -1 input_map { key: "rows" value: "rows" }
         output_map { key: "scaled" value: "doubled" } }
  step { model_name: "scale" model_version: -1 input_map { key: "rows" value: "doubled" }
         output_map { key: "scaled" value: "quadrupled" } }
}
"""


def accumulator() -> graphs.Bundle:
    """`sum` = `after` = `x` + `before`, unless the sequence `begins`: then `x`."""
    axes: graphs.Axes = ["batch", 1]
    return graphs.bundle_of(
        [
            helper.make_node("Sub", ["one", "begins"], ["keeps"]),
            helper.make_node("Mul", ["before", "keeps"], ["kept"]),
            helper.make_node("Add", ["x", "kept"], ["sum"]),
            helper.make_node("Identity", ["sum"], ["after"]),
        ],
        [graphs.value(name, "FP32", axes) for name in ("x", "begins", "before")],
        [graphs.value(name, "FP32", axes) for name in ("sum", "after")],
        {"one": np.array(1, np.float32)},
    )


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory, transport: str) -> AsyncIterator[Inference]:
    folder = tmp_path_factory.mktemp("models")
    put_model(folder, "scale", graphs.scale(2))
    put_model(folder, "named", graphs.scale(2), labels={"scaled": ["a", "b", "c", "d"]})
    put_model(folder, "lookup", graphs.lookup())
    put_model(folder, "brain", graphs.identity("BF16", ["batch", 2]))
    put_model(folder, "accumulator", accumulator(), config=ACCUMULATOR)
    put_model(folder, "cached", graphs.scale(3), config="response_cache { enable: true }")
    put_model(folder, "twice", graphs.Bundle({}, graphs.scale(1).signature), config=TWICE)
    countdown = graphs.Bundle({"model.py": COUNTDOWN.encode()}, graphs.scale(1).signature)
    config = """
        backend: "python" model_transaction_policy { decoupled: true }
        input { name: "start" data_type: TYPE_INT32 dims: [1] }
        output { name: "number" data_type: TYPE_INT32 dims: [1] }
    """
    put_model(folder, "countdown", countdown, config=config)
    async with folder_server(
        folder, tmp_path_factory.mktemp("home"), transport, allow_client_shm=True, cache_mib=4, max_batch_size=8
    ) as inference:
        await inference.settled(0)
        yield inference


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def client(server: Inference) -> AsyncIterator[triton.InferenceServerClient]:
    """The synchronous client; its calls go to threads, for the server may run on this loop."""
    connected = triton.InferenceServerClient(server.address)
    yield connected
    await asyncio.to_thread(connected.close)


def given(name: str, array: np.ndarray, datatype: str) -> triton.InferInput:
    tensor = triton.InferInput(name, list(array.shape), datatype)
    tensor.set_data_from_numpy(array)
    return tensor


async def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def test_all_models_are_ready(server: Inference) -> None:
    index = await server.oip.RepositoryIndex(pb.RepositoryIndexRequest())
    assert {entry.name: (entry.version, entry.state, entry.reason) for entry in index.models} == dict.fromkeys(
        ("scale", "named", "lookup", "brain", "accumulator", "cached", "twice", "countdown"), ("1", "READY", "")
    )


async def test_the_configuration_is_whole(server: Inference) -> None:
    config = (await server.oip.ModelConfig(pb.ModelConfigRequest(name="scale"))).config
    assert (config.name, config.platform, config.max_batch_size) == ("scale", "onnxruntime_onnx", 8)
    assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [("rows", mc.TYPE_FP32, [4])]
    named = (await server.oip.ModelConfig(pb.ModelConfigRequest(name="named"))).config
    assert [(one.name, one.label_filename) for one in named.output] == [("scaled", "scaled.txt")]


async def test_statistics_count_requests_rows_and_runs(server: Inference) -> None:
    before = await statistics(server, "lookup")
    for rows in (1, 1, 3):
        await server.oip.ModelInfer(infer_request("lookup", {"index": np.zeros(rows, np.int64)}))
    await failure(server.oip.ModelInfer(infer_request("lookup", {"index": np.array([99])})))
    after = await statistics(server, "lookup")
    assert after.inference_count - before.inference_count == 5
    assert after.execution_count - before.execution_count == 3
    assert after.inference_stats.success.count - before.inference_stats.success.count == 3
    assert after.inference_stats.fail.count - before.inference_stats.fail.count == 1
    assert {batch.batch_size for batch in after.batch_stats} >= {1, 3}
    stats = after.inference_stats
    assert stats.success.ns >= stats.queue.ns + stats.compute_infer.ns > 0
    assert after.last_inference > 0


async def statistics(server: Inference, model: str) -> pb.ModelStatistics:
    answer = await server.oip.ModelStatistics(pb.ModelStatisticsRequest(name=model))
    (one,) = answer.model_stats
    assert (one.name, one.version) == (model, "1")
    return one


async def test_statistics_of_all_models_and_of_one_that_is_not_there(server: Inference) -> None:
    everything = await server.oip.ModelStatistics(pb.ModelStatisticsRequest())
    assert len(everything.model_stats) == 8
    code, details = await failure(server.oip.ModelStatistics(pb.ModelStatisticsRequest(name="nobody")))
    assert (code, "unknown model" in details) == (grpc.StatusCode.NOT_FOUND, True)


async def test_a_stream_answers_in_order_and_outlives_an_error(server: Inference) -> None:
    requests = []
    for number, index in enumerate([3, 99, 7, 1]):
        request = infer_request("lookup", {"index": np.array([index])})
        request.id = str(number)
        requests.append(request)
    requests[2].model_name = "nobody"
    call = server.oip.ModelStreamInfer(iter(requests))
    answers = [answer async for answer in call]
    assert [answer.infer_response.id for answer in answers] == ["0", "1", "2", "3"]
    assert [bool(answer.error_message) for answer in answers] == [False, True, True, False]
    assert "could not compute" in answers[1].error_message
    assert "unknown model" in answers[2].error_message
    assert all(answer.infer_response.parameters["triton_final_response"].bool_param for answer in answers)
    assert np.frombuffer(answers[3].infer_response.raw_output_contents[0], np.int64) == [10]
    assert await call.code() is grpc.StatusCode.OK


async def test_many_requests_of_one_stream(server: Inference) -> None:
    def requests() -> Any:
        for number in range(1000):
            yield infer_request("lookup", {"index": np.array([number % 10])})

    answers = [answer async for answer in server.oip.ModelStreamInfer(requests())]
    values = [np.frombuffer(answer.infer_response.raw_output_contents[0], np.int64)[0] for answer in answers]
    assert values == [number % 10 * 10 for number in range(1000)]


async def test_a_decoupled_model_answers_as_often_as_it_likes(server: Inference) -> None:
    request = infer_request("countdown", {"start": np.array([3], np.int32)})
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    answers = [answer.infer_response async for answer in server.oip.ModelStreamInfer(iter([request]))]
    assert [np.frombuffer(raw, np.int32)[0] for answer in answers for raw in answer.raw_output_contents] == [3, 2, 1]
    assert [answer.parameters["triton_final_response"].bool_param for answer in answers] == [False, False, False, True]
    assert not answers[-1].outputs
    code, details = await failure(server.oip.ModelInfer(request))
    assert (code, "decoupled" in details) == (grpc.StatusCode.UNIMPLEMENTED, True)


async def test_sequences_through_the_clients_stream(client: triton.InferenceServerClient) -> None:
    def ask() -> list[float]:
        answers: queue.Queue[Any] = queue.Queue()
        client.start_stream(lambda result, error: answers.put(error or result.as_numpy("sum")[0, 0]))
        for number in (1, 2, 3):
            for sequence in (7, 8):
                x = given("x", np.array([[number * sequence]], np.float32), "FP32")
                client.async_stream_infer(
                    "accumulator", [x], sequence_id=sequence, sequence_start=number == 1, sequence_end=number == 3
                )
        client.stop_stream()
        return [answers.get_nowait() for _ in range(6)]

    assert await asyncio.to_thread(ask) == [7, 8, 21, 24, 42, 48]


async def test_a_step_of_no_sequence_is_refused(server: Inference) -> None:
    request = infer_request("accumulator", {"x": np.zeros((1, 1), np.float32)})
    assert (await failure(server.oip.ModelInfer(request)))[0] is grpc.StatusCode.INVALID_ARGUMENT
    request.parameters["sequence_id"].int64_param = 5
    code, details = await failure(server.oip.ModelInfer(request))
    assert (code, "START" in details.upper()) == (grpc.StatusCode.INVALID_ARGUMENT, True)


async def test_an_ensemble_is_a_pipeline_of_models(server: Inference) -> None:
    response = await server.oip.ModelInfer(infer_request("twice", {"rows": ROWS}))
    assert response.raw_output_contents[0] == (ROWS * 4).tobytes()


async def test_a_cached_answer_is_counted_as_such(server: Inference) -> None:
    for _ in range(3):
        response = await server.oip.ModelInfer(infer_request("cached", {"rows": ROWS}, outputs=("scaled",)))
        assert response.raw_output_contents[0] == (ROWS * 3).tobytes()
    stats = await statistics(server, "cached")
    assert (stats.inference_stats.cache_hit.count, stats.inference_stats.cache_miss.count) == (2, 1)
    # As in Triton, only what was computed is an inference; all three succeeded.
    assert (stats.inference_count, stats.execution_count, stats.inference_stats.success.count) == (2, 1, 3)


async def test_bf16_travels_raw(server: Inference) -> None:
    array = np.array([[1.5, -3]], ml_dtypes.bfloat16)
    request = pb.ModelInferRequest(model_name="brain", raw_input_contents=[array.tobytes()])
    request.inputs.add(name="given", datatype="BF16", shape=[1, 2])
    response = await server.oip.ModelInfer(request)
    assert (response.outputs[0].datatype, response.raw_output_contents[0]) == ("BF16", array.tobytes())


async def test_classification_names_the_classes(client: triton.InferenceServerClient) -> None:
    wanted = [triton.InferRequestedOutput("scaled", class_count=2)]
    result = await asyncio.to_thread(client.infer, "named", [given("rows", ROWS, "FP32")], outputs=wanted)
    texts = [[text.decode() for text in row] for row in result.as_numpy("scaled")]
    assert texts == [["6.000000:3:d", "4.000000:2:c"], ["14.000000:3:d", "12.000000:2:c"]]


async def test_stage_timings_come_when_asked_for(server: Inference) -> None:
    request = infer_request("scale", {"rows": ROWS})
    request.parameters["penstock_timings"].bool_param = True
    parameters = (await server.oip.ModelInfer(request)).parameters
    assert set(parameters) == {"queue_ns", "gather_ns", "run_ns", "settle_ns", "batch_rows"}
    assert parameters["batch_rows"].int64_param >= 2
    assert parameters["run_ns"].int64_param > 0
    assert not (await server.oip.ModelInfer(infer_request("scale", {"rows": ROWS}))).parameters


async def test_tensors_in_shared_memory(client: triton.InferenceServerClient) -> None:
    def ask() -> None:
        key = f"/penstock-test-{os.getpid()}"
        region = shared_memory.create_shared_memory_region("mine", key, 96)
        try:
            shared_memory.set_shared_memory_region(region, [ROWS])
            client.register_system_shared_memory("mine", key, 96)
            assert client.get_system_shared_memory_status(as_json=True)["regions"]["mine"]["byte_size"] == "96"
            rows, scaled = triton.InferInput("rows", [2, 4], "FP32"), triton.InferRequestedOutput("scaled")
            rows.set_shared_memory("mine", 32)
            scaled.set_shared_memory("mine", 32, offset=48)
            result = client.infer("scale", [rows], outputs=[scaled, triton.InferRequestedOutput("total")])
            np.testing.assert_array_equal(
                shared_memory.get_contents_as_numpy(region, np.float32, [2, 4], offset=48), ROWS * 2
            )
            assert result.as_numpy("total").tolist() == [[12], [44]]
            rows.set_shared_memory("mine", 128)
            with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT"):
                client.infer("scale", [rows])
            client.unregister_system_shared_memory("mine")
            assert not client.get_system_shared_memory_status(as_json=True).get("regions")
            rows.set_shared_memory("mine", 32)
            with pytest.raises(InferenceServerException, match="mine"):
                client.infer("scale", [rows])
        finally:
            shared_memory.destroy_shared_memory_region(region)

    await asyncio.to_thread(ask)


async def test_cuda_memory_needs_a_gpu(server: Inference) -> None:
    request = pb.CudaSharedMemoryRegisterRequest(name="gpu", raw_handle=bytes(64), byte_size=4)
    code, _ = await failure(server.oip.CudaSharedMemoryRegister(request))
    assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_settings_of_traces_and_logs(client: triton.InferenceServerClient) -> None:
    def ask() -> None:
        assert client.get_trace_settings(as_json=True)["settings"]["trace_level"]["value"] == ["OFF"]
        with pytest.raises(InferenceServerException, match="INVALID_ARGUMENT"):
            client.update_trace_settings(settings={"trace_file": "/etc/passwd"})
        logs = client.get_log_settings(as_json=True)["settings"]
        assert logs["log_info"]["bool_param"] is True
        changed = client.update_log_settings({"log_info": False}, as_json=True)["settings"]
        assert not changed["log_info"]["bool_param"]
        client.update_log_settings({"log_info": True})

    await asyncio.to_thread(ask)


async def test_models_are_not_loaded_by_request_unless_the_server_says_so(client: triton.InferenceServerClient) -> None:
    calls: list[Callable[[str], None]] = [client.load_model, client.unload_model]
    for call in calls:
        with pytest.raises(InferenceServerException, match="explicit model load / unload is not allowed"):
            await asyncio.to_thread(call, "scale")


async def test_models_come_and_go_by_request(tmp_path: Path, transport: str) -> None:
    folder = tmp_path / "models"
    put_model(folder, "scale", graphs.scale(2))
    async with folder_server(folder, tmp_path / "home", transport, mode="explicit") as server:
        oip = server.oip
        assert not (await oip.ModelReady(pb.ModelReadyRequest(name="scale"))).ready
        await oip.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="scale"))
        assert (await server.infer("scale", ROWS)).raw_output_contents[0] == (ROWS * 2).tobytes()
        override = pb.RepositoryModelLoadRequest(model_name="scale")
        override.parameters["config"].string_param = json.dumps({"maxBatchSize": 3})
        await oip.RepositoryModelLoad(override)
        assert (await oip.ModelConfig(pb.ModelConfigRequest(name="scale"))).config.max_batch_size == 3
        # KServe's dialect: the name comes in the first field, and goes back there.
        answer = await oip.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(repository_name="scale"))
        assert answer.SerializeToString() == b"\x0a\x05scale\x10\x01"
        assert not (await oip.ModelReady(pb.ModelReadyRequest(name="scale"))).ready
        code, details = await failure(oip.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="nobody")))
        assert "failed to load" in details
        assert code is not grpc.StatusCode.INTERNAL
