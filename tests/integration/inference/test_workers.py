"""Several workers are one server: whichever of them a call reaches, all have changed, and all are counted."""

import asyncio
import os
import resource
import signal
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import grpc
import numpy as np
import pytest
from google.rpc import error_details_pb2, status_pb2
from onnx import helper
from tests.integration.inference import graphs
from tests.integration.inference.fleet import WAIT_S, infer_request
from tests.integration.inference.several_workers import (
    ROWS,
    WORKERS,
    Server,
    index,
    load,
    on_each,
    refused,
    said,
    scaled,
    started,
    unload,
)
from tests.integration.rpc.conformance import TRANSPORTS

from penstock.oip import inference_pb2 as pb
from penstock.oip.inference_pb2_grpc import GRPCInferenceServiceStub


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    # Not pytest's own folder: paths of sockets have to be short.
    with tempfile.TemporaryDirectory(prefix="pw-") as folder, started(Path(folder), request.param) as running:
        yield running


async def test_loads_and_unloads_reach_every_worker_whichever_is_asked(server: Server) -> None:
    assert server.private() == [f"worker-{number}.sock" for number in range(WORKERS)]
    async with server.each() as stubs:
        for factor, via in enumerate(stubs, 3):
            model = graphs.scale(factor).files["model.onnx"]
            await load(via, "made", config="{}", **{"file:1/model.onnx": model})
            for answer in await on_each(stubs, lambda stub: scaled(stub, "made")):
                np.testing.assert_array_equal(answer, ROWS * factor)
            first, *others = await on_each(stubs, index)
            assert ("made", "1", "READY") in first
            assert all(other == first for other in others)
        for via in stubs:
            await unload(via, "made")
            for stub in stubs:
                error = await refused(scaled(stub, "made"))
                assert error.code() is grpc.StatusCode.NOT_FOUND
            assert (await refused(unload(via, "made"))).code() is grpc.StatusCode.NOT_FOUND
            await load(via, "made", config="{}", **{"file:1/model.onnx": model})
        await unload(stubs[0], "made")


async def test_loads_at_once_end_the_same_everywhere(server: Server) -> None:
    async with server.each() as stubs:
        for _ in range(3):
            loads = []
            for number in range(12):
                model = graphs.scale(number).files["model.onnx"]
                loads.append(load(stubs[number % WORKERS], "raced", config="{}", **{"file:1/model.onnx": model}))
            await asyncio.gather(*loads)
            first, *others = [answer.tolist() for answer in await on_each(stubs, lambda stub: scaled(stub, "raced"))]
            assert others == [first] * (WORKERS - 1)
        await unload(stubs[0], "raced")


def heavy(mib: int) -> bytes:
    """A model with so much to load."""
    weights = np.ones((graphs.FEATURES, mib * 2**20 // 4 // graphs.FEATURES), np.float32)
    bundle = graphs.bundle_of(
        [
            helper.make_node("MatMul", ["rows", "weights"], ["wide"]),
            helper.make_node("ReduceSum", ["wide", "axes"], ["scaled"], keepdims=1),
        ],
        [graphs.value("rows", "FP32", ["batch", graphs.FEATURES])],
        [graphs.value("scaled", "FP32", ["batch", 1])],
        {"weights": weights, "axes": np.array([1], np.int64)},
    )
    return bundle.files["model.onnx"]


async def test_an_unload_waits_until_a_load_is_done_everywhere(server: Server) -> None:
    # Without an order the unload would be there before so much has arrived.
    model = heavy(20)
    async with server.each() as stubs:
        for via in stubs:
            call = asyncio.ensure_future(load(via, "raced", config="{}", **{"file:1/model.onnx": model}))
            unloaded = False
            while not unloaded:
                with suppress(grpc.aio.AioRpcError):
                    await unload(stubs[0], "raced")
                    unloaded = True
            await call
            assert "raced" not in str(await on_each(stubs, index))


async def test_a_large_upload_passes_through(server: Server) -> None:
    model = heavy(62)
    async with server.each() as stubs:
        for via in stubs:
            await load(via, "large", config="{}", **{"file:1/model.onnx": model})
            request = infer_request("large", {"rows": ROWS})
            for stub in stubs:
                assert (await stub.ModelInfer(request, timeout=WAIT_S)).model_version == "1"
            await unload(via, "large")


async def eventually_ready(stubs: list[GRPCInferenceServiceStub], model: str) -> None:
    async with asyncio.timeout(WAIT_S):
        while not all((model, "1", "READY") in entries for entries in await on_each(stubs, index)):  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_a_load_that_has_begun_outlives_its_caller(server: Server) -> None:
    model = heavy(20)
    async with server.each() as stubs:
        for via in stubs:
            call = asyncio.ensure_future(load(via, "left", config="{}", **{"file:1/model.onnx": model}))
            async with asyncio.timeout(WAIT_S):
                while not any(("left", "1", "LOADING") in entries for entries in await on_each(stubs, index)):
                    assert not call.done()
            call.cancel()
            await eventually_ready(stubs, "left")
            await unload(via, "left")


async def test_what_worker_0_refuses_changes_nothing_and_says_the_same_everywhere(server: Server) -> None:
    async with server.each() as stubs:
        before = await on_each(stubs, index)
        for model in ("torn", "nobody", "a/b"):
            errors = await on_each(stubs, lambda stub, model=model: refused(load(stub, model)))
            assert len({said(error) for error in errors}) == 1
            infos = []
            for error in errors:
                trailers = dict(error.trailing_metadata())
                status = status_pb2.Status.FromString(trailers["grpc-status-details-bin"])
                info = error_details_pb2.ErrorInfo()
                status.details[0].Unpack(info)
                assert info.metadata.pop("request_id") == trailers["x-request-id"]
                infos.append((info.reason, dict(info.metadata), [detail.type_url for detail in status.details]))
            assert infos.count(infos[0]) == WORKERS
        assert [[entry for entry in one if entry[0] != "torn"] for one in await on_each(stubs, index)] == [
            [entry for entry in one if entry[0] != "torn"] for one in before
        ]


@contextmanager
def shared_object(content: bytes) -> Iterator[tuple[str, Path]]:
    path = Path("/dev/shm", f"penstock-test-{os.getpid()}-{time.monotonic_ns()}")
    path.write_bytes(content)
    try:
        yield path.name, path
    finally:
        path.unlink()


async def register(stub: GRPCInferenceServiceStub, name: str, key: str, byte_size: int = 32) -> None:
    request = pb.SystemSharedMemoryRegisterRequest(name=name, key=key, byte_size=byte_size)
    await stub.SystemSharedMemoryRegister(request, timeout=WAIT_S)


async def unregister(stub: GRPCInferenceServiceStub, name: str) -> None:
    await stub.SystemSharedMemoryUnregister(pb.SystemSharedMemoryUnregisterRequest(name=name), timeout=WAIT_S)


async def regions(stub: GRPCInferenceServiceStub) -> dict[str, int]:
    status = await stub.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest(), timeout=WAIT_S)
    return {name: region.byte_size for name, region in status.regions.items()}


async def test_shared_memory_is_every_workers(server: Server) -> None:
    request = infer_request("scale", {"rows": ROWS})
    del request.raw_input_contents[:]
    request.inputs[0].parameters["shared_memory_region"].string_param = "mine"
    request.inputs[0].parameters["shared_memory_byte_size"].int64_param = ROWS.nbytes
    async with server.each() as stubs:
        with shared_object(ROWS.tobytes()) as (key, _):
            for via in stubs:
                await register(via, "mine", key)
                for stub in stubs:
                    answer = await stub.ModelInfer(request, timeout=WAIT_S)
                    assert answer.raw_output_contents[0] == (ROWS * 2).tobytes()
                errors = await on_each(stubs, lambda stub, key=key: refused(register(stub, "mine", key)))
                assert {error.code() for error in errors} == {grpc.StatusCode.ALREADY_EXISTS}
                await unregister(via, "mine")
                assert await on_each(stubs, regions) == [{}] * WORKERS
                for stub in stubs:
                    error = await refused(stub.ModelInfer(request, timeout=WAIT_S))
                    assert error.code() is grpc.StatusCode.NOT_FOUND


async def test_of_registrations_at_once_the_same_one_is_made_everywhere(server: Server) -> None:
    with shared_object(bytes(100)) as (key, _):
        async with server.each() as stubs:
            for _ in range(5):
                outcomes = await asyncio.gather(
                    *(register(stubs[size % WORKERS], "contested", key, size) for size in range(1, 31)),
                    return_exceptions=True,
                )
                assert [type(outcome) for outcome in outcomes].count(type(None)) == 1
                made = await on_each(stubs, regions)
                assert made == [{"contested": outcomes.index(None) + 1}] * WORKERS
                await unregister(stubs[0], "contested")


async def test_a_change_that_fails_on_another_worker_is_told_and_can_be_repeated(server: Server) -> None:
    with shared_object(ROWS.tobytes()) as (key, _):
        async with server.each() as stubs:
            # Every connection between the workers is there: that takes descriptors.
            for stub in stubs:
                await unregister(stub, "")
            pid = server.workers()[1]
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            for via in stubs:
                lowest_free = min(set(range(10_000)) - {int(one.name) for one in Path(f"/proc/{pid}/fd").iterdir()})
                resource.prlimit(pid, resource.RLIMIT_NOFILE, (lowest_free, before[1]))
                try:
                    error = await refused(register(via, "mine", key))
                finally:
                    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
                assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
                assert "Worker 1 of this server failed" in error.details()
                assert "repeat the call is safe" in error.details()
                assert "Too many open files" in error.details()
                assert await on_each(stubs, regions) == [{}] * WORKERS
                await register(via, "mine", key)
                assert await on_each(stubs, regions) == [{"mine": 32}] * WORKERS
                await unregister(via, "mine")


async def test_log_settings_are_the_same_everywhere_also_after_a_race(server: Server) -> None:
    async def settings(stub: GRPCInferenceServiceStub, **values: int) -> dict[str, str]:
        request = pb.LogSettingsRequest()
        for name, value in values.items():
            request.settings[name].uint32_param = value
        answer = await stub.LogSettings(request, timeout=WAIT_S)
        return {name: str(value) for name, value in answer.settings.items()}

    async with server.each() as stubs:
        before = await on_each(stubs, settings)
        for level, via in enumerate(stubs, 5):
            changed = await settings(via, log_verbose_level=level)
            assert str(level) in changed["log_verbose_level"]
            assert await on_each(stubs, settings) == [changed] * WORKERS
        await asyncio.gather(*(settings(stubs[n % WORKERS], log_verbose_level=n) for n in range(1, 31)))
        first, *others = await on_each(stubs, settings)
        assert others == [first] * (WORKERS - 1)
        error = await refused(settings(stubs[-1], log_file=1))
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        await settings(stubs[0], log_verbose_level=0)
        assert await on_each(stubs, settings) == before


async def test_trace_settings_are_the_same_everywhere_and_each_worker_traces(server: Server) -> None:
    async def settings(stub: GRPCInferenceServiceStub, **values: str) -> dict[str, list[str]]:
        request = pb.TraceSettingRequest()
        for name, value in values.items():
            request.settings[name].value.append(value)
        answer = await stub.TraceSetting(request, timeout=WAIT_S)
        return {name: list(value.value) for name, value in answer.settings.items()}

    async with server.each() as stubs:
        for rate, via in enumerate(stubs, 1):
            changed = await settings(via, trace_level="TIMESTAMPS", trace_rate=str(rate))
            assert changed["trace_rate"] == [str(rate)]
            assert await on_each(stubs, settings) == [changed] * WORKERS
        await settings(stubs[0], trace_rate="1")
        for stub in stubs:
            await scaled(stub, "scale")
        changed = await settings(stubs[-1], trace_level="OFF")
        assert await on_each(stubs, settings) == [changed] * WORKERS
    for number in range(WORKERS):
        file = server.folder / f"trace.json.worker-{number}"
        async with asyncio.timeout(WAIT_S):
            while not file.exists() or "REQUEST_END" not in file.read_text():  # noqa: ASYNC110  # another process
                await asyncio.sleep(0.02)


async def statistics(stub: GRPCInferenceServiceStub, model: str = "scale") -> pb.ModelStatistics:
    answer = await stub.ModelStatistics(pb.ModelStatisticsRequest(name=model), timeout=WAIT_S)
    (one,) = answer.model_stats
    return one


async def test_statistics_and_metrics_are_those_of_all_workers(server: Server) -> None:
    labels = (("model", "scale"), ("version", "1"))
    async with server.each() as stubs:
        before = await statistics(stubs[0])
        began_ms = time.time_ns() // 1_000_000
        # One after the other: each is a run of its own.
        for times, stub in enumerate(stubs, 1):
            for _ in range(times):
                await scaled(stub, "scale", ROWS[:1])
                await scaled(stub, "scale", np.repeat(ROWS, times, 0))
            with suppress(grpc.aio.AioRpcError):
                await scaled(stub, "scale", ROWS[:, :1])
        first, *others = await on_each(stubs, statistics)
        assert others == [first] * (WORKERS - 1)
        requests = 2 * (1 + 2 + 3)
        rows = (1 + 2 + 3) + 2 * (1 + 4 + 9)
        assert first.inference_count - before.inference_count == rows
        assert first.execution_count - before.execution_count == requests
        assert first.inference_stats.success.count - before.inference_stats.success.count == requests
        assert first.inference_stats.success.ns > before.inference_stats.success.ns
        assert first.last_inference >= began_ms
        runs = {batch.batch_size: batch.compute_infer.count for batch in first.batch_stats}
        runs_before = {batch.batch_size: batch.compute_infer.count for batch in before.batch_stats}
        assert list(runs) == sorted(runs)
        grown = {size: count - runs_before.get(size, 0) for size, count in runs.items()}
        assert {size: count for size, count in grown.items() if count} == {1: 6, 2: 1, 4: 2, 6: 3}
        metrics = await asyncio.to_thread(server.metrics)
        assert metrics["nv_inference_count_total", labels] == first.inference_count
        assert metrics["nv_inference_exec_count_total", labels] == first.execution_count
        assert metrics["penstock_inference_batch_rows_count", labels] == first.execution_count
        assert metrics["penstock_inference_batch_rows_sum", labels] == first.inference_count
        assert metrics["penstock_inference_batch_rows_bucket", (("le", "+Inf"), *labels)] == first.execution_count
        for number in range(WORKERS):
            worker = (("worker", str(number)),)
            assert metrics["process_resident_memory_bytes", worker] > 2**20
        everything = await on_each(stubs, lambda stub: stub.ModelStatistics(pb.ModelStatisticsRequest()))
        assert [[one.name for one in answer.model_stats] for answer in everything] == [["scale"]] * WORKERS
        for stub in stubs:
            assert (await refused(statistics(stub, "nobody"))).code() is grpc.StatusCode.NOT_FOUND


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_a_silent_worker_makes_no_wrong_numbers_and_its_change_is_made_when_it_goes_on(server: Server) -> None:
    async with server.each() as stubs:
        running = server.workers()[2]
        with stopped(running):
            with pytest.raises(urllib.error.HTTPError, match="503") as caught:
                await asyncio.to_thread(server.metrics)
            caught.value.close()
            speaking = await _speaking(stubs)
            for stub in speaking:
                request = pb.ModelStatisticsRequest(name="scale")
                error = await refused(stub.ModelStatistics(request, timeout=1))
                assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            model = graphs.scale(7).files["model.onnx"]
            late = await refused(load(speaking[0], "late", 2, config="{}", **{"file:1/model.onnx": model}))
            assert late.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        await eventually_ready(stubs, "late")
        assert await asyncio.to_thread(server.metrics)
        await unload(stubs[0], "late")


async def _speaking(stubs: list[GRPCInferenceServiceStub]) -> list[GRPCInferenceServiceStub]:
    """Those whose worker answers."""
    lives = await asyncio.gather(
        *(stub.ServerLive(pb.ServerLiveRequest(), timeout=1) for stub in stubs), return_exceptions=True
    )
    return [stub for stub, live in zip(stubs, lives, strict=True) if isinstance(live, pb.ServerLiveResponse)]


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_a_stop_finishes_what_has_begun_and_leaves_nothing_behind(transport: str) -> None:
    with tempfile.TemporaryDirectory(prefix="pw-") as folder, started(Path(folder), transport) as running:
        pids = running.workers()
        async with running.each() as stubs:
            calls = [asyncio.ensure_future(load(stub, "scale")) for stub in stubs]
            await asyncio.sleep(0.01)
            running.process.terminate()
            for outcome in await asyncio.gather(*calls, return_exceptions=True):
                # Loaded before the stop, or refused by it: told either way.
                assert outcome is None or outcome.code() is grpc.StatusCode.UNAVAILABLE
        assert await asyncio.to_thread(running.process.wait, WAIT_S) == 0
        assert not [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        assert not running.private()
