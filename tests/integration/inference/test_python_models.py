"""Models in Python as clients see them."""

import asyncio
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from tests.integration.inference import graphs
from tests.integration.inference.fleet import Inference, folder_server, infer_request, put_model

from penstock.oip import inference_pb2 as pb

TOLD = """
class Model:
    def __init__(self, config): pass
    def infer(self, inputs, parameters): return {"y": inputs["x"] * parameters.get("times", 1)}
"""
ECHO = """
import numpy as np

class Model:
    def __init__(self, config): pass
    def infer(self, inputs, parameters):
        kinds = [type(element).__name__.encode() for element in inputs["x"].tolist()]
        return {"y": inputs["x"], "kinds": np.array(kinds, object)}
"""


SLOW = """
import time

class Model:
    def __init__(self, config): pass
    def infer(self, inputs, parameters):
        time.sleep(0.3)
        return {"y": inputs["x"]}
"""


def put_python(folder: Path, name: str, code: str, datatype: str, config: str) -> None:
    bundle = graphs.Bundle({"model.py": code.encode()}, graphs.scale(1).signature)
    tensors = f"""
        input {{ name: "x" data_type: {datatype} dims: [-1] }}
        output {{ name: "y" data_type: {datatype} dims: [-1] }}
    """
    put_model(folder, name, bundle, config=f'backend: "python" {tensors} {config}')


@pytest.mark.parametrize(("config", "factor"), [("", 3), ("dynamic_batching {}", 1)])
async def test_parameters_reach_a_model_with_rows_unless_it_asks_for_batches(
    tmp_path: Path, transport: str, config: str, factor: int
) -> None:
    put_python(tmp_path / "models", "told", TOLD, "TYPE_INT64", f"max_batch_size: 8 {config}")
    async with folder_server(tmp_path / "models", tmp_path / "home", transport) as server:
        await server.settled(0)
        response = await server.oip.ModelInfer(_times(3))
        assert np.frombuffer(response.raw_output_contents[0], np.int64).tolist() == [factor, 2 * factor]
        described = (await server.oip.ModelConfig(pb.ModelConfigRequest(name="told"))).config
        assert described.HasField("dynamic_batching") == bool(config)


@pytest.mark.parametrize("config", ["", "dynamic_batching {}"])
@pytest.mark.parametrize("status", ["unavailable", "resource_exhausted"])
async def test_a_full_queue_has_the_status_that_the_operator_chose(
    tmp_path: Path, transport: str, config: str, status: str
) -> None:
    put_python(tmp_path / "models", "told", SLOW, "TYPE_INT64", f"max_batch_size: 2 {config}")
    limits = {"max_queue_size": 1, "queue_full": status}
    async with folder_server(tmp_path / "models", tmp_path / "home", transport, **limits) as server:
        await server.settled(0)
        calls = [asyncio.ensure_future(server.oip.ModelInfer(_times(1)).code()) for _ in range(6)]
        codes = {code.name.lower() for code in await asyncio.gather(*calls)}
        assert codes == {"ok", status}


async def test_answers_of_a_model_without_batches_are_kept_where_it_says_so(tmp_path: Path, transport: str) -> None:
    put_python(tmp_path / "models", "told", TOLD, "TYPE_INT64", "max_batch_size: 8 response_cache { enable: true }")
    async with folder_server(tmp_path / "models", tmp_path / "home", transport, cache_mib=1) as server:
        await server.settled(0)
        for times in (2, 2, 3):
            await server.oip.ModelInfer(_times(times))
        assert await _hits(server) == 1


async def test_bytes_need_not_be_text(tmp_path: Path, transport: str) -> None:
    kinds = 'output { name: "kinds" data_type: TYPE_STRING dims: [-1] }'
    put_python(tmp_path / "models", "echo", ECHO, "TYPE_STRING", kinds)
    elements = [b"\xff\xd8\xff", "é".encode(), b""]
    raw = b"".join(len(one).to_bytes(4, "little") + one for one in elements)
    as_raw, typed = (pb.ModelInferRequest(model_name="echo") for _ in range(2))
    as_raw.inputs.add(name="x", datatype="BYTES", shape=[3])
    as_raw.raw_input_contents.append(raw)
    typed.inputs.add(name="x", datatype="BYTES", shape=[3]).contents.bytes_contents.extend(elements)
    async with folder_server(tmp_path / "models", tmp_path / "home", transport) as server:
        await server.settled(0)
        for request in (as_raw, typed):
            response = await server.oip.ModelInfer(request)
            assert response.raw_output_contents[0] == raw
            assert response.raw_output_contents[1] == b"\5\0\0\0bytes\3\0\0\0str\3\0\0\0str"


async def test_many_texts_do_not_hold_up_others(tmp_path: Path, transport: str) -> None:
    code = ECHO.replace('inputs["x"].tolist()', "[]")
    kinds = 'output { name: "kinds" data_type: TYPE_STRING dims: [-1] }'
    put_python(tmp_path / "models", "echo", code, "TYPE_STRING", kinds)
    count = 1_000_000
    request = pb.ModelInferRequest(model_name="echo", raw_input_contents=[bytes(4 * count)])
    request.inputs.add(name="x", datatype="BYTES", shape=[count])
    longest_s = 0.0

    async def watch() -> None:
        nonlocal longest_s
        while True:
            started = time.monotonic()
            await asyncio.sleep(0.001)
            longest_s = max(longest_s, time.monotonic() - started)

    async with folder_server(tmp_path / "models", tmp_path / "home", transport, max_message_mib=64) as server:
        await server.settled(0)
        for ask in (server.oip.ModelInfer, partial(_streamed, server)):
            started = time.monotonic()
            watching = asyncio.create_task(watch())
            response = await ask(request)
            watching.cancel()
            assert response.raw_output_contents[0] == bytes(4 * count)
            took_s = time.monotonic() - started
            assert longest_s < took_s / 4, f"the loop stood still for {longest_s:.2f} of {took_s:.2f} s"


async def _streamed(server: Inference, request: pb.ModelInferRequest) -> pb.ModelInferResponse:
    (answer,) = [answer async for answer in server.oip.ModelStreamInfer(iter([request]))]
    return answer.infer_response


def _times(times: int) -> pb.ModelInferRequest:
    request = infer_request("told", {"x": np.array([[1, 2]])})
    request.parameters["times"].int64_param = times
    return request


async def _hits(server: Inference) -> int:
    answer = await server.oip.ModelStatistics(pb.ModelStatisticsRequest(name="told"))
    return answer.model_stats[0].inference_stats.cache_hit.count
