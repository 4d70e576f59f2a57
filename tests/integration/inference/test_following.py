"""An inference server that follows a registry: switches, failures, restarts."""

import asyncio
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import numpy as np
import pytest
from tests.integration.inference import graphs
from tests.integration.inference.fleet import Inference, Registry, doomed_server, eventually, inference_server

from penstock.api.inference.v1 import serving_service_pb2 as serving
from penstock.oip import inference_pb2 as pb

ROWS = np.ones((1, 4), np.float32)
READY = serving.SERVING_STATE_READY
FAILED = serving.SERVING_STATE_FAILED


def factor(response: pb.ModelInferResponse) -> float:
    """By how much a `scale` model that was given `ROWS` scales."""
    return float(np.frombuffer(response.raw_output_contents[0], np.float32)[0])


async def fails_with(inference: Inference, model: str, code: grpc.StatusCode, version: str = "") -> str:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await inference.infer(model, ROWS, version)
    assert caught.value.code() is code
    return caught.value.details() or ""


async def eventually_exists(path: Path) -> None:
    async def exists() -> bool:
        return path.exists()

    await eventually(exists)


async def test_weights_split_the_traffic_and_a_number_names_a_version(tmp_path: Path, transport: str) -> None:
    registry = Registry(tmp_path / "registry")
    first, second = [await registry.add("scale", number, graphs.scale(number)) for number in (1, 2)]
    await registry.deploy(scale=[(first, 30), (second, 70)])
    async with registry.running() as port, inference_server(tmp_path / "home", port, transport) as inference:
        await inference.settled()
        answers = await asyncio.gather(*(inference.infer("scale", ROWS) for _ in range(400)))
        assert all(factor(answer) == float(answer.model_version) for answer in answers)
        share = sum(answer.model_version == "2" for answer in answers) / len(answers)
        assert 0.55 < share < 0.85
        assert factor(await inference.infer("scale", ROWS, "1")) == 1
        assert [(one.version, one.weight, one.state) for one in await inference.served("scale")] == [
            (1, 30, READY),
            (2, 70, READY),
        ]
        metadata = await inference.oip.ModelMetadata(pb.ModelMetadataRequest(name="scale"))
        assert list(metadata.versions) == ["1", "2"]


async def test_a_switch_under_load_loses_no_request(tmp_path: Path, transport: str) -> None:
    registry = Registry(tmp_path / "registry")
    versions = [await registry.add("scale", number, graphs.scale(number)) for number in (1, 2, 3)]
    await registry.deploy(scale=[(versions[0], 100)])
    async with registry.running() as port, inference_server(tmp_path / "home", port, transport) as inference:
        await inference.settled()
        seen: list[str] = []
        stop = asyncio.Event()

        async def load() -> None:
            while not stop.is_set():
                answer = await inference.infer("scale", ROWS)
                assert factor(answer) == float(answer.model_version)
                seen.append(answer.model_version)

        async def served(number: int) -> bool:
            return bool(seen) and seen[-1] == str(number)

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(load())
            await eventually(lambda: served(1))
            await registry.deploy(scale=[(versions[1], 100)])
            await eventually(lambda: served(2))
            await registry.deploy(scale=[(versions[2], 100)])
            await eventually(lambda: served(3))
            stop.set()
        await inference.settled(3)
        assert [one.version for one in await inference.served()] == [3]
        assert "is not found" in await fails_with(inference, "scale", grpc.StatusCode.NOT_FOUND, "1")
        kept = {path.name for path in (tmp_path / "home" / "inference" / "cache").iterdir()}
        assert kept == {blob.digest.removeprefix("sha256:") for blob in versions[2].files.values()}


async def test_a_version_that_fails_leaves_the_old_one_serving(tmp_path: Path, transport: str) -> None:
    registry = Registry(tmp_path / "registry")
    good = await registry.add("scale", 1, graphs.scale(1))
    broken = await registry.add("scale", 2, graphs.Bundle({"model.onnx": b"\x0a\x03abc"}, graphs.scale(1).signature))
    other = await registry.add("other", 1, graphs.scale(5))
    await registry.deploy(scale=[(good, 100)])
    async with registry.running() as port, inference_server(tmp_path / "home", port, transport) as inference:
        await inference.settled(1)
        await registry.deploy(scale=[(broken, 100)], other=[(other, 100)])
        await inference.settled(2)
        assert await inference.state_of("scale", 2) == FAILED
        assert factor(await inference.infer("scale", ROWS)) == 1
        assert factor(await inference.infer("other", ROWS)) == 5
        assert "cannot open model.onnx" in await fails_with(inference, "scale", grpc.StatusCode.UNAVAILABLE, "2")
        await registry.deploy(scale=[(await registry.add("scale", 3, graphs.scale(3)), 100)])
        await inference.settled(3)
        assert factor(await inference.infer("scale", ROWS)) == 3
        assert "unknown model" in await fails_with(inference, "other", grpc.StatusCode.NOT_FOUND)


WRONG = {
    "a signature with another axis": (
        graphs.Bundle(graphs.scale(1).files, graphs.identity("FP32", ["batch", 4]).signature),
        "expected inputs given: FP32 [batch, 4]; the graph has rows: FP32 [batch, 4]",
    ),
    "no model.onnx": (
        graphs.Bundle({"model.txt": b"x"}, graphs.scale(1).signature),
        "expected 'model.onnx' among them",
    ),
    "a file name with a path": (
        graphs.Bundle({**graphs.scale(1).files, "../evil": b"x"}, graphs.scale(1).signature),
        "got '../evil'",
    ),
    "external data outside the bundle": (
        graphs.with_external_weight("../../../desired.binpb", np.ones(4, np.float32)),
        "external data in '../../../desired.binpb', which is not a file of the bundle (model.onnx, weights.bin)",
    ),
    "external data that is not listed": (
        graphs.with_external_weight("other.bin", np.ones(4, np.float32)),
        "external data in 'other.bin'",
    ),
    "a model outside the bundle": (
        graphs.with_config(graphs.scale(1), 'default_model_filename: "/etc/passwd"'),
        "expected '/etc/passwd' among them",
    ),
    "a model of another bundle": (
        graphs.with_config(graphs.scale(1), 'default_model_filename: "../other/1/model.onnx"'),
        "expected '../other/1/model.onnx' among them",
    ),
    "a model that is no protobuf": (
        graphs.Bundle({"model.onnx": b"\x0a\xff\xff\xff\x7fabc"}, graphs.scale(1).signature),
        "The model is not an ONNX file",
    ),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_wrong_bundle_is_never_served(tmp_path: Path, transport: str, case: str) -> None:
    bundle, message = WRONG[case]
    registry = Registry(tmp_path / "registry")
    await registry.deploy(scale=[(await registry.add("scale", 1, bundle), 100)])
    async with registry.running() as port, inference_server(tmp_path / "home", port, transport) as inference:
        await inference.settled()
        (served,) = await inference.served()
        assert served.state == FAILED
        assert message in served.message
        assert message in await fails_with(inference, "scale", grpc.StatusCode.UNAVAILABLE)


@pytest.mark.parametrize(
    ("bundle", "message"),
    [
        (graphs.first_only(), "Warm-up failed: The model could not compute these inputs"),
        (graphs.first_row(), "Output 'first' does not follow the batch: expected 2 rows; got shape [1, 4]"),
    ],
)
async def test_a_version_that_cannot_run_is_found_out_by_the_warm_up(
    tmp_path: Path, transport: str, bundle: graphs.Bundle, message: str
) -> None:
    registry = Registry(tmp_path / "registry")
    await registry.deploy(odd=[(await registry.add("odd", 1, bundle), 100)])
    async with registry.running() as port:
        async with inference_server(tmp_path / "home", port, transport) as inference:
            await inference.settled()
            (served,) = await inference.served()
            assert served.state == FAILED
            assert message in served.message
        async with inference_server(tmp_path / "home", port, transport, warm_up=False) as inference:
            await inference.settled()
            assert await inference.state_of("odd", 1) == READY


async def test_external_data_is_read_from_the_bundle(tmp_path: Path, transport: str) -> None:
    registry = Registry(tmp_path / "registry")
    bundle = graphs.with_external_weight("weights.bin", np.full(4, 6, np.float32))
    await registry.deploy(scale=[(await registry.add("scale", 1, bundle), 100)])
    async with registry.running() as port, inference_server(tmp_path / "home", port, transport) as inference:
        await inference.settled()
        assert factor(await inference.infer("scale", ROWS)) == 6
    assert not list((tmp_path / "home" / "inference" / "workspace").iterdir())


async def test_the_configuration_chooses_among_the_files_of_the_bundle(tmp_path: Path, transport: str) -> None:
    registry = Registry(tmp_path / "registry")
    files = {**graphs.scale(2).files, "net.onnx": graphs.scale(3).files["model.onnx"]}
    bundle = graphs.with_config(graphs.Bundle(files, graphs.scale(3).signature), 'default_model_filename: "net.onnx"')
    await registry.deploy(scale=[(await registry.add("scale", 1, bundle), 100)])
    async with registry.running() as port, inference_server(tmp_path / "home", port, transport) as inference:
        await inference.settled()
        assert factor(await inference.infer("scale", ROWS)) == 3


async def test_a_corrupted_file_in_the_cache_is_fetched_again(tmp_path: Path, transport: str) -> None:
    registry = Registry(tmp_path / "registry")
    version = await registry.add("scale", 1, graphs.scale(2))
    await registry.deploy(scale=[(version, 100)])
    async with registry.running() as port:
        async with inference_server(tmp_path / "home", port, transport) as inference:
            await inference.settled()
        (cached,) = (tmp_path / "home" / "inference" / "cache").iterdir()
        whole = cached.read_bytes()
        cached.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        async with inference_server(tmp_path / "home", port, transport) as inference:
            await inference.settled()
            assert factor(await inference.infer("scale", ROWS)) == 2
        assert cached.read_bytes() == whole


async def test_a_corrupted_blob_of_the_registry_is_never_served(tmp_path: Path, transport: str) -> None:
    registry = Registry(tmp_path / "registry")
    version = await registry.add("scale", 1, graphs.scale(2))
    blob = version.files["model.onnx"]
    path = registry.blob_path(blob)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    await registry.deploy(scale=[(version, 100)])
    async with registry.running() as port, inference_server(tmp_path / "home", port, transport) as inference:
        await inference.settled()
        (served,) = await inference.served()
        assert served.state == FAILED
        assert blob.digest in served.message
        assert "Restore this blob" in served.message
        path.write_bytes(whole)

        async def ready() -> bool:
            return await inference.state_of("scale", 1) == READY

        await eventually(ready)
        assert factor(await inference.infer("scale", ROWS)) == 2


async def test_the_server_outlives_the_registry_and_follows_it_again(tmp_path: Path, transport: str) -> None:
    registry = Registry(tmp_path / "registry")
    await registry.deploy(scale=[(await registry.add("scale", 1, graphs.scale(1)), 100)])
    async with AsyncExitStack() as stack:
        async with registry.running() as port:
            inference = await stack.enter_async_context(inference_server(tmp_path / "home", port, transport))
            await inference.settled()
        assert factor(await inference.infer("scale", ROWS)) == 1
        await registry.deploy(scale=[(await registry.add("scale", 2, graphs.scale(2)), 100)])
        async with registry.running(port):
            await inference.settled(2)
            assert factor(await inference.infer("scale", ROWS)) == 2


async def test_a_restart_without_the_registry_serves_what_was_served(tmp_path: Path, transport: str) -> None:
    registry = Registry(tmp_path / "registry")
    await registry.deploy(scale=[(await registry.add("scale", 7, graphs.scale(3)), 100)])
    desired = tmp_path / "home" / "inference" / "desired.binpb"
    async with registry.running() as port, inference_server(tmp_path / "home", port, transport) as inference:
        await inference.settled()
        await eventually_exists(desired)
    async with inference_server(tmp_path / "home", port, transport) as inference:
        await inference.settled()
        answer = await inference.infer("scale", ROWS)
        assert (factor(answer), answer.model_version) == (3, "7")


async def test_a_killed_server_serves_again_without_the_registry(tmp_path: Path, transport: str) -> None:
    registry = Registry(tmp_path / "registry")
    await registry.deploy(scale=[(await registry.add("scale", 1, graphs.scale(3)), 100)])
    async with registry.running() as port, doomed_server(tmp_path / "home", port, transport) as inference:
        await inference.settled()
        await eventually_exists(tmp_path / "home" / "inference" / "desired.binpb")
    async with doomed_server(tmp_path / "home", port, transport) as inference:
        await inference.settled()
        assert factor(await inference.infer("scale", ROWS)) == 3


async def test_without_registry_and_history_the_server_lives_and_is_not_ready(tmp_path: Path, transport: str) -> None:
    desired = tmp_path / "home" / "inference" / "desired.binpb"
    desired.parent.mkdir(parents=True)
    desired.write_bytes(b"\xff not a message")
    async with inference_server(tmp_path / "home", 1, transport) as inference:
        assert (await inference.oip.ServerLive(pb.ServerLiveRequest())).live
        assert not (await inference.oip.ServerReady(pb.ServerReadyRequest())).ready
        assert "unknown model" in await fails_with(inference, "scale", grpc.StatusCode.NOT_FOUND)


async def test_the_inference_service_needs_neither_the_training_side_nor_the_onnx_package() -> None:
    check = (
        "import sys, penstock.inference.app; "
        "print([m for m in ('tensorflow', 'keras', 'onnx', 'sqlalchemy', 'obstore') if m in sys.modules])"
    )
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", check, stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    assert (process.returncode, out.decode().strip()) == (0, "[]")
