"""Jobs run by real workers: the whole way to the registry, and what crashes cost."""

import asyncio
import os
import signal
import time
from pathlib import Path

import numpy as np
from tests.integration.registry.registries import connected as registry_at
from tests.integration.registry.registries import serving as registry_serving
from tests.integration.training.trainings import (
    Child,
    Training,
    blobs_in,
    connected,
    flowers,
    mlp_spec,
    served,
    states,
)

from penstock.api.dataset.v1.dataset_pb2 import Split
from penstock.api.registry.v1 import registry_service_pb2
from penstock.api.registry.v1.model_pb2 import Version
from penstock.api.training.v1.job_pb2 import JobErrorKind, JobState, Phase


async def test_a_job_from_rows_to_a_registered_model(tmp_path: Path) -> None:
    async with registry_serving(tmp_path) as address, served(tmp_path, registry=address) as training:
        await training.dataset(flowers())
        job = await training.job(mlp_spec(standardize=True, patience=3, dropout=0.1, epochs=8))
        events = [event async for event in training.watch(job.job_id)]
        ended = await training.look(job.job_id)

        assert states(events) == ["QUEUED", "RUNNING", "REGISTERING", "SUCCEEDED"], ended
        epochs = [event.epoch_metrics for event in events if event.HasField("epoch_metrics")]
        assert [metrics.epoch for metrics in epochs] == list(range(1, len(epochs) + 1))
        assert set(epochs[0].values) == {"loss", "accuracy", "val_loss", "val_accuracy"}
        assert {metrics.epoch_count for metrics in epochs} == {8}
        phases = [event.progress.phase for event in events if event.HasField("progress")]
        assert phases == sorted(phases)
        assert set(phases) == set(Phase.values()) - {Phase.PHASE_UNSPECIFIED}
        # TensorFlow's own words are kept out.
        assert [event.log_line.text for event in events if event.HasField("log_line")] == []

        result = ended.result
        assert list(result.labels) == ["iris", "lily", "rose"]
        assert [(spec.name, spec.datatype) for spec in (*result.signature.inputs, *result.signature.outputs)] == [
            ("features", "FP32"),
            ("probabilities", "FP32"),
        ]
        assert result.test_metrics["accuracy"] >= 0.9
        async with registry_at(address) as registry:
            request = registry_service_pb2.GetVersionRequest(model="flowers", alias="champion")
            version = (await registry.models.GetVersion(request)).version
            graph = await registry.stored(version.files["model.onnx"].digest)
        assert set(version.files) == {"model.onnx", "model.keras", "manifest.json"}
        assert version.parity == result.parity
        assert await _accuracy(graph, training, list(result.labels)) == result.test_metrics["accuracy"]
        assert blobs_in(tmp_path, "checkpoints") == []
        async with asyncio.timeout(20):
            # The job has ended when it is registered; its worker may take a moment more to be gone.
            while list((tmp_path / "training" / "workers").iterdir()):  # noqa: ASYNC110  # a folder tells nobody
                await asyncio.sleep(0.02)

        await training.dataset(b"a,b\n1e300,1\n2,2\n", name="huge", split={"train": 1})
        spec = mlp_spec(label_column="b")
        spec.dataset = "huge"
        ended = await training.ended((await training.job(spec)).job_id)
        assert (ended.state, ended.error.kind) == (JobState.JOB_STATE_FAILED, JobErrorKind.JOB_ERROR_KIND_SPEC)
        assert "'a' has a value of magnitude 1e+300" in ended.error.message
        assert len(ended.attempts) == 1

        job = await training.job(mlp_spec(epochs=10_000))
        await _epoch(training, job.job_id, 1)
        began = time.monotonic()
        await training.cancel(job.job_id)
        assert (await training.ended(job.job_id)).state == JobState.JOB_STATE_CANCELLED
        assert time.monotonic() - began < 20
        assert blobs_in(tmp_path, "checkpoints") == []


async def test_a_job_outlives_its_worker_and_its_service(tmp_path: Path) -> None:
    async with registry_serving(tmp_path) as registry_address:
        settings = {"registry": registry_address, "checkpoint_interval_s": 0}
        child = Child(tmp_path, **settings)
        async with connected(await child.address()) as training:
            await training.dataset(flowers())
            spec = mlp_spec(epochs=120, patience=120)
            spec.max_attempts = 2
            job = await training.job(spec)
            await _epoch(training, job.job_id, 10)
            (worker,) = child.workers()
            os.kill(worker, signal.SIGKILL)

            resumed = await _epoch(training, job.job_id, 20, attempt=2)
            assert 0 < resumed <= 20
            (worker,) = child.workers()
            child.kill()
        await _gone(worker)

        child = Child(tmp_path, **settings)
        try:
            async with connected(await child.address()) as training:
                ended = await training.ended(job.job_id)
                events = [event async for event in training.watch(job.job_id)]
        finally:
            child.kill()
        async with registry_at(registry_address) as registry:
            request = registry_service_pb2.ListVersionsRequest(model="flowers")
            versions: list[Version] = list((await registry.models.ListVersions(request)).versions)

    assert ended.state == JobState.JOB_STATE_SUCCEEDED, ended
    assert [version.number for version in versions] == [1]
    assert "SIGKILL" in ended.attempts[0].error.message
    assert "restarted" in ended.attempts[1].error.message
    # Each attempt goes on after the epoch of its checkpoint, which was made by the one before it.
    for attempt in ended.attempts:
        epochs = [
            event.epoch_metrics.epoch
            for event in events
            if event.attempt == attempt.number and event.HasField("epoch_metrics")
        ]
        assert epochs == list(range(attempt.resumed_epoch + 1, attempt.resumed_epoch + 1 + len(epochs)))
        assert attempt.number == 1 or attempt.resumed_epoch > 0
    assert epochs[-1] == 120
    assert ended.result.test_metrics["accuracy"] >= 0.9


async def _epoch(training: Training, job_id: str, epoch: int, attempt: int = 1) -> int:
    """Waits until an attempt has finished an epoch, and tells after which it began."""
    first = 0
    async for event in training.watch(job_id):
        if event.attempt == attempt and event.HasField("epoch_metrics"):
            first = first or event.epoch_metrics.epoch
            if event.epoch_metrics.epoch >= epoch:
                return first - 1
    raise AssertionError(await training.look(job_id))


async def _accuracy(graph: bytes, training: Training, labels: list[str]) -> float:
    """Of the registered graph on the test split."""
    import onnxruntime

    rows = await training.rows("data", Split.SPLIT_TEST)
    features = np.array([row[:-1] for row in rows], np.float32)
    (answers,) = onnxruntime.InferenceSession(graph).run(["probabilities"], {"features": features})
    right = [labels[place] == row[-1] for place, row in zip(answers.argmax(axis=1), rows, strict=True)]
    return float(np.float32(np.mean(right)))


async def _gone(pid: int) -> None:
    """Waits for the end of a process that is nobody's child here."""
    deadline = time.monotonic() + 20
    while Path(f"/proc/{pid}/stat").exists() and Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z":
        assert time.monotonic() < deadline, "the worker outlives its service"
        await asyncio.sleep(0.05)
