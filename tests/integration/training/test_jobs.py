"""The state machine of jobs through the wire, with workers that the test plays itself."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest_asyncio
from structlog.testing import capture_logs
from tests.integration.registry.registries import blob_of, refusal
from tests.integration.registry.registries import connected as registry_at
from tests.integration.registry.registries import serving as registry_serving
from tests.integration.training.hand import GRAPH, Hands, HandWorker, epoch_event, store
from tests.integration.training.trainings import (
    Training,
    audit_rows,
    blobs_in,
    connected,
    flowers,
    mlp_spec,
    served,
    serving,
    states,
)

from penstock.api.registry.v1 import registry_service_pb2
from penstock.api.training.v1 import training_service_pb2 as pb
from penstock.api.training.v1 import worker_service_pb2
from penstock.api.training.v1.job_pb2 import (
    Job,
    JobErrorKind,
    JobEvent,
    JobState,
    LogLine,
    MlpTask,
    Progress,
    StateChange,
)
from penstock.api.types.v1.blob_pb2 import Blob


@pytest_asyncio.fixture
async def training(tmp_path: Path, hands: Hands) -> AsyncIterator[Training]:
    async with served(tmp_path, registry="127.0.0.1:9") as running:
        await running.dataset(flowers())
        yield running


async def begun(training: Training, hands: Hands) -> tuple[Job, HandWorker]:
    """A job whose first worker has started."""
    job = await training.job(mlp_spec())
    worker = HandWorker(training, (await hands.next()).lease)
    await worker.start()
    return job, worker


async def test_a_lost_worker_is_replaced_until_no_attempt_is_left(training: Training, hands: Hands) -> None:
    job = await training.job(mlp_spec())
    for number in (1, 2, 3):
        process = await hands.next()
        assert (process.lease.job_id, process.lease.fencing_token) == (job.job_id, number)
        process.ended.set()
    ended = await training.ended(job.job_id)

    events = [event async for event in training.watch(job.job_id)]
    assert states(events) == ["QUEUED", "RUNNING", "QUEUED", "RUNNING", "QUEUED", "RUNNING", "FAILED"]
    assert [event.attempt for event in events] == [0, 1, 0, 2, 0, 3, 3]
    assert ended.error.kind == JobErrorKind.JOB_ERROR_KIND_WORKER_LOST
    assert "exited with code 7. That was attempt 3 of 3" in ended.error.message
    assert [attempt.number for attempt in ended.attempts] == [1, 2, 3]
    assert all(attempt.error.kind == JobErrorKind.JOB_ERROR_KIND_WORKER_LOST for attempt in ended.attempts)
    assert ended.HasField("end_time")


async def test_a_worker_without_the_current_lease_is_refused_in_every_call(training: Training, hands: Hands) -> None:
    job = await training.job(mlp_spec())
    process = await hands.next()
    process.ended.set()
    stale, current = HandWorker(training, process.lease), HandWorker(training, (await hands.next()).lease)
    thief = worker_service_pb2.Lease(job_id=job.job_id, fencing_token=2, secret="guessed")
    unknown = worker_service_pb2.Lease(job_id="none", fencing_token=1, secret="x")
    await store(training.artifacts, b"state")

    for worker in (stale, HandWorker(training, thief), HandWorker(training, unknown)):
        for call in (
            worker.start(),
            worker.heartbeat(),
            worker.record(epoch_event(1)),
            worker.name_checkpoint(1, blob_of(b"state")),
            worker.complete(),
            worker.fail(JobErrorKind.JOB_ERROR_KIND_SPEC, "no"),
        ):
            code, text, _ = await refusal(call)
            assert (code, "lease" in text) == (grpc.StatusCode.PERMISSION_DENIED, True)

    assert (await current.start()).spec == job.spec
    assert (await training.look(job.job_id)).state == JobState.JOB_STATE_RUNNING
    events = [event async for event in _so_far(training, job.job_id, 4)]
    assert states(events) == ["QUEUED", "RUNNING", "QUEUED", "RUNNING"]


async def test_a_silent_worker_loses_its_lease(tmp_path: Path, hands: Hands) -> None:
    async with served(tmp_path, lease_s=2) as training:
        await training.dataset(flowers())
        job, worker = await begun(training, hands)
        # Longer than the lease, and kept by speaking.
        for _ in range(5):
            await asyncio.sleep(0.5)
            assert await worker.heartbeat() is False
        second = await hands.next()

        assert second.lease.fencing_token == 2
        assert (await refusal(worker.heartbeat()))[0] is grpc.StatusCode.PERMISSION_DENIED
        assert "was silent for 2 s" in (await training.look(job.job_id)).attempts[0].error.message


async def test_the_next_attempt_goes_on_from_the_last_checkpoint(
    training: Training, hands: Hands, tmp_path: Path
) -> None:
    job = await training.job(mlp_spec())
    process = await hands.next()
    worker = HandWorker(training, process.lease)
    start = await worker.start()
    assert not start.HasField("checkpoint")
    assert (start.spec, start.registry_address) == (job.spec, "127.0.0.1:9")
    assert start.lease_duration.ToSeconds() == 30
    code, *_ = await refusal(worker.name_checkpoint(1, blob_of(b"never written")))
    assert code is grpc.StatusCode.NOT_FOUND
    await worker.checkpoint(1, b"after one")
    await worker.checkpoint(2, b"after two")
    await worker.name_checkpoint(2, blob_of(b"after two"))
    assert blobs_in(tmp_path, "checkpoints") == [blob_of(b"after two").digest]

    process.ended.set()
    second = HandWorker(training, (await hands.next()).lease)
    start = await second.start()
    assert start.checkpoint == worker_service_pb2.Checkpoint(epoch=2, content=blob_of(b"after two"))
    assert (await training.look(job.job_id)).attempts[1].resumed_epoch == 2

    await second.fail(JobErrorKind.JOB_ERROR_KIND_DIVERGED, "The loss was nan.")
    assert (await training.ended(job.job_id)).error.message == "The loss was nan."
    assert blobs_in(tmp_path, "checkpoints") == []


async def test_an_error_of_the_worker_is_never_tried_again(training: Training, hands: Hands) -> None:
    job, worker = await begun(training, hands)

    await worker.fail(JobErrorKind.JOB_ERROR_KIND_PARITY, "Row 3 differs.")

    ended = await training.ended(job.job_id)
    assert (ended.state, ended.error.kind) == (JobState.JOB_STATE_FAILED, JobErrorKind.JOB_ERROR_KIND_PARITY)
    assert ended.attempts[0].error == ended.error
    assert hands.started.empty()


async def test_a_watch_goes_on_from_any_cursor_without_gaps_or_repeats(training: Training, hands: Hands) -> None:
    job, worker = await begun(training, hands)
    live = asyncio.create_task(_all(training, job.job_id, 0))
    for start in range(1, 1001, 250):
        await worker.record(*(epoch_event(epoch) for epoch in range(start, start + 250)))
    first = [event async for event in _so_far(training, job.job_id, 700)]
    await worker.record(JobEvent(log_line=LogLine(text="last words")))
    await worker.fail(JobErrorKind.JOB_ERROR_KIND_INTERNAL, "no")

    everything = await live
    assert first + await _all(training, job.job_id, first[-1].cursor) == everything
    assert [event.epoch_metrics.epoch for event in everything if event.HasField("epoch_metrics")] == [*range(1, 1001)]
    cursors = [event.cursor for event in everything]
    assert cursors == sorted(set(cursors))
    assert cursors[0] > 0
    assert everything[-1].state_change.state == JobState.JOB_STATE_FAILED
    assert all(event.HasField("time") for event in everything)
    assert await _all(training, job.job_id, cursors[-1]) == []


async def test_a_watch_ends_when_the_server_drains(tmp_path: Path, hands: Hands) -> None:
    async with AsyncExitStack() as stack:
        address = await stack.enter_async_context(serving(tmp_path))
        async with connected(address) as training:
            await training.dataset(flowers())
            job, _ = await begun(training, hands)
            seen = asyncio.Event()

            async def watch() -> None:
                async for _ in training.watch(job.job_id):
                    seen.set()

            watching = asyncio.create_task(watch())
            await seen.wait()
            await stack.aclose()
            code, text, _ = await refusal(watching)
    assert (code, "last cursor" in text) == (grpc.StatusCode.UNAVAILABLE, True)


async def test_a_queued_job_is_cancelled_at_once(training: Training, hands: Hands) -> None:
    await begun(training, hands)
    job = await training.job(mlp_spec())

    assert (await training.cancel(job.job_id)).state == JobState.JOB_STATE_CANCELLED
    assert states([event async for event in training.watch(job.job_id)]) == ["QUEUED", "CANCELLED"]
    assert await training.cancel(job.job_id) == await training.look(job.job_id)


async def test_a_running_job_is_asked_to_stop(training: Training, hands: Hands) -> None:
    job, worker = await begun(training, hands)
    assert await worker.record(epoch_event(1)) is False

    assert (await training.cancel(job.job_id)).state == JobState.JOB_STATE_CANCELLING
    assert (await training.cancel(job.job_id)).state == JobState.JOB_STATE_CANCELLING
    assert await worker.heartbeat() is True
    assert await worker.record(epoch_event(2)) is True
    await worker.fail(JobErrorKind.JOB_ERROR_KIND_INTERNAL, "stopped")

    ended = await training.ended(job.job_id)
    assert ended.state == JobState.JOB_STATE_CANCELLED
    assert not ended.HasField("error")
    code, *_ = await refusal(training.cancel("none"))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_a_worker_that_does_not_stop_is_killed(tmp_path: Path, hands: Hands) -> None:
    async with served(tmp_path, cancel_grace_s=0.2) as training:
        await training.dataset(flowers())
        job = await training.job(mlp_spec())
        process = await hands.next()
        worker = HandWorker(training, process.lease)
        await worker.start()
        await training.cancel(job.job_id)
        assert await worker.heartbeat() is True

        assert (await training.ended(job.job_id)).state == JobState.JOB_STATE_CANCELLED
        assert process.killed.is_set()


async def test_a_result_that_comes_while_cancelling_is_not_registered(training: Training, hands: Hands) -> None:
    job, worker = await begun(training, hands)
    await training.cancel(job.job_id)

    await worker.complete()

    assert states(await _all(training, job.job_id, 0)) == ["QUEUED", "RUNNING", "CANCELLING", "CANCELLED"]


async def test_registering_waits_for_the_registry_and_survives_a_restart(tmp_path: Path, hands: Hands) -> None:
    async with registry_serving(tmp_path) as address, registry_at(address) as registry:
        await registry.store(GRAPH)
    with capture_logs() as logs:
        async with served(tmp_path, registry=address) as training:
            await training.dataset(flowers())
            job, worker = await begun(training, hands)
            await worker.complete()
            while not any(log["event"] == "registration waits" for log in logs):  # noqa: ASYNC110  # a log wakes nobody
                await asyncio.sleep(0.02)
            code, *_ = await refusal(training.cancel(job.job_id))
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert (await training.look(job.job_id)).state == JobState.JOB_STATE_REGISTERING
    port = int(address.rpartition(":")[2])
    async with served(tmp_path, registry=address) as training, registry_serving(tmp_path, port=port):
        ended = await training.ended(job.job_id)
        assert ended.state == JobState.JOB_STATE_SUCCEEDED
        assert (ended.result.model, ended.result.version) == ("flowers", 1)
        assert dict(ended.result.test_metrics) == {"accuracy": 0.75, "loss": 0.5}
        assert ended.result.train_duration.ToMicroseconds() > 0

        async with registry_at(address) as registry:
            request = registry_service_pb2.GetVersionRequest(model="flowers", alias="champion")
            version = (await registry.models.GetVersion(request)).version
            moves = await registry.models.ListAliasMoves(
                registry_service_pb2.ListAliasMovesRequest(model="flowers", alias="champion")
            )
    assert version.provenance.job_id == job.job_id
    assert version.provenance.dataset_digest == job.dataset_digest == blob_of(flowers()).digest
    assert dict(version.metrics) == {"test_accuracy": 0.75, "test_loss": 0.5}
    assert list(version.labels) == ["iris", "lily", "rose"]
    assert [move.reason for move in moves.moves] == [f"job {job.job_id}"]


async def test_what_the_registry_refuses_fails_the_job(tmp_path: Path, hands: Hands) -> None:
    async with registry_serving(tmp_path) as address, served(tmp_path, registry=address) as training:
        await training.dataset(flowers())
        job, worker = await begun(training, hands)
        # Its graph was never written to the registry.
        await worker.complete()

        ended = await training.ended(job.job_id)
    assert (ended.state, ended.error.kind) == (JobState.JOB_STATE_FAILED, JobErrorKind.JOB_ERROR_KIND_REGISTRATION)
    assert blob_of(GRAPH).digest in ended.error.message


async def test_a_restart_of_the_service_costs_a_job_no_attempt(tmp_path: Path, hands: Hands) -> None:
    spec = mlp_spec()
    spec.max_attempts = 1
    async with served(tmp_path) as training:
        await training.dataset(flowers())
        job = await training.job(spec)
        await HandWorker(training, (await hands.next()).lease).checkpoint(4, b"after four")
    async with served(tmp_path) as training:
        lease = (await hands.next()).lease
        assert (lease.job_id, lease.fencing_token) == (job.job_id, 2)
        again = await training.look(job.job_id)
        assert (again.state, again.attempts[1].resumed_epoch) == (JobState.JOB_STATE_RUNNING, 4)
        assert "restarted" in again.attempts[0].error.message
        await training.cancel(job.job_id)
    async with served(tmp_path) as training:
        assert (await training.look(job.job_id)).state == JobState.JOB_STATE_CANCELLED
        assert hands.started.empty()


async def test_a_repeated_request_returns_the_first_job(training: Training, hands: Hands) -> None:
    job = await training.job(mlp_spec(), "mine")

    assert (await training.job(mlp_spec(), "mine")).job_id == job.job_id
    code, text, _ = await refusal(training.job(mlp_spec(epochs=6), "mine"))
    assert (code, "'mine'" in text) == (grpc.StatusCode.ALREADY_EXISTS, True)
    assert (await training.job(mlp_spec())).job_id != job.job_id


async def test_jobs_are_listed_newest_first_in_pages_and_by_filter(training: Training, hands: Hands) -> None:
    await training.dataset(flowers(), name="other")
    made = [await training.job(mlp_spec(), f"r{number}") for number in range(5)]
    spec = mlp_spec()
    spec.dataset, spec.registration.model = "other", "lilies"
    made.append(await training.job(spec))
    await hands.next()
    newest_first = [job.job_id for job in reversed(made)]

    async def listed(**fields: Any) -> tuple[list[str], str]:
        page = await training.jobs.ListJobs(pb.ListJobsRequest(**fields))
        return [job.job_id for job in page.jobs], page.next_page_token

    page, token = await listed(page_size=4)
    assert page == newest_first[:4]
    assert await listed(page_size=4, page_token=token) == (newest_first[4:], "")
    assert await listed(filter=pb.JobFilter(dataset="other")) == (newest_first[:1], "")
    assert await listed(filter=pb.JobFilter(model="flowers", states=[JobState.JOB_STATE_RUNNING])) == (
        newest_first[-1:],
        "",
    )
    queued = pb.JobFilter(states=[JobState.JOB_STATE_QUEUED, JobState.JOB_STATE_FAILED])
    assert await listed(filter=queued) == (newest_first[:-1], "")
    for wrong in ({"page_size": 1001}, {"page_token": "x"}, {"filter": pb.JobFilter(states=[0])}):
        assert (await refusal(listed(**wrong)))[0] is grpc.StatusCode.INVALID_ARGUMENT


async def test_every_transition_has_its_audit_record(training: Training, hands: Hands, tmp_path: Path) -> None:
    job, worker = await begun(training, hands)
    request = pb.CancelJobRequest(job_id=job.job_id)
    await training.jobs.CancelJob(request, metadata=(("x-request-id", "mine"),))
    await worker.fail(JobErrorKind.JOB_ERROR_KIND_INTERNAL, "stopped")

    rows = [row for row in audit_rows(tmp_path) if row[1] == job.job_id]
    assert [action for action, *_ in rows] == ["job.queued", "job.running", "job.cancelling", "job.cancelled"]
    assert rows[2][2] == "mine"


WRONG_SPECS: dict[str, tuple[dict[str, Any], str]] = {
    "no task": ({"task": 0}, "spec.mlp.task"),
    "no label": ({"label_column": ""}, "spec.mlp.label_column"),
    "an unknown label": ({"label_column": "sort"}, "spec.mlp.label_column"),
    "a label that is a measure": ({"label_column": "width"}, "spec.mlp.label_column"),
    "a word to regress": ({"task": MlpTask.MLP_TASK_REGRESSION}, "spec.mlp.label_column"),
    "an unknown feature": ({"feature_columns": ["width", "height"]}, "spec.mlp.feature_columns[1]"),
    "the label as a feature": ({"feature_columns": ["kind"]}, "spec.mlp.feature_columns[0]"),
    "a feature twice": ({"feature_columns": ["width", "width"]}, "spec.mlp.feature_columns[1]"),
    "a layer without units": ({"hidden_units": [8, 0]}, "spec.mlp.hidden_units[1]"),
    "a layer too wide": ({"hidden_units": [16_385]}, "spec.mlp.hidden_units[0]"),
    "too many layers": ({"hidden_units": [1] * 33}, "spec.mlp.hidden_units"),
    "a model too large to build": ({"hidden_units": [16_384] * 3}, "spec.mlp.hidden_units"),
    "an unknown activation": ({"activation": 9}, "spec.mlp.activation"),
    "all units dropped": ({"dropout": 1.0}, "spec.mlp.dropout"),
    "no dropout at all": ({"dropout": float("nan")}, "spec.mlp.dropout"),
    "a step too large": ({"learning_rate": 1.5}, "spec.mlp.learning_rate"),
    "a batch too large": ({"batch_size": 65_537}, "spec.mlp.batch_size"),
    "too many epochs": ({"epochs": 10_001}, "spec.mlp.epochs"),
    "negative patience": ({"patience": -1}, "spec.mlp.patience"),
}


async def test_a_wrong_spec_is_refused_field_by_field(training: Training) -> None:
    named = {}
    for case, (fields, _) in WRONG_SPECS.items():
        code, _, named[case] = await refusal(training.job(mlp_spec(**fields)))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert {case: field in named[case] for case, (_, field) in WRONG_SPECS.items()} == dict.fromkeys(WRONG_SPECS, True)
    for field, value in (("model", "A"), ("alias", "12"), ("alias", "a b"), ("description", "x" * 1001)):
        spec = mlp_spec()
        setattr(spec.registration, field, value)
        assert (await refusal(training.job(spec)))[2] == [f"spec.registration.{field}"]
    spec = mlp_spec()
    spec.max_attempts = 11
    assert (await refusal(training.job(spec, "no spaces")))[2] == ["request_id", "spec.max_attempts"]
    spec = mlp_spec()
    spec.dataset = "none"
    assert (await refusal(training.job(spec)))[0] is grpc.StatusCode.NOT_FOUND
    assert not (await training.jobs.ListJobs(pb.ListJobsRequest())).jobs


async def test_a_spec_is_checked_against_the_rows(training: Training) -> None:
    await training.dataset(b"a,b,t,l\n1,2,x,1\n3,4,y,1\n5,6,z,1\n", name="one-class", split={"train": 1})
    spec = mlp_spec(label_column="l", feature_columns=["a"], patience=1)
    spec.dataset = "one-class"

    assert (await refusal(training.job(spec)))[2] == ["spec.mlp.patience"]
    spec.mlp.patience = 0
    _, text, fields = await refusal(training.job(spec))
    assert (fields, "2 to 10,000 distinct values" in text) == (["spec.mlp.label_column"], True)
    spec.mlp.label_column = "t"
    assert (await training.job(spec)).state == JobState.JOB_STATE_QUEUED
    spec.mlp.ClearField("feature_columns")
    spec.mlp.label_column = "l"
    _, text, fields = await refusal(training.job(spec))
    assert (fields, "'t' is STRING; name the feature columns" in text) == (["spec.mlp.feature_columns"], True)


async def test_what_a_worker_may_not_say(training: Training, hands: Hands) -> None:
    _, worker = await begun(training, hands)
    state = JobEvent(state_change=StateChange(state=JobState.JOB_STATE_SUCCEEDED))
    wrong = {
        "events[0]": worker.record(state),
        "events[1]": worker.record(epoch_event(1), JobEvent()),
        "events": worker.record(*[epoch_event(1)] * 1001),
        "events[0].log_line.text": worker.record(JobEvent(log_line=LogLine(text="ä" * 4097))),
        "events[0].progress.fraction": worker.record(JobEvent(progress=Progress(fraction=1.5))),
        "files": worker.complete(files={}),
        "signature": worker.complete(signature=None),
        "parity": worker.complete(parity=None),
        "test_metrics['loss']": worker.complete(test_metrics={"loss": float("nan")}),
        "checkpoint.content.digest": worker.name_checkpoint(1, Blob(digest="../x")),
        "error.kind": worker.fail(JobErrorKind.JOB_ERROR_KIND_REGISTRATION, "no"),
    }
    for field, call in wrong.items():
        code, _, named = await refusal(call)
        assert (code, field in named) == (grpc.StatusCode.INVALID_ARGUMENT, True), field
    assert await worker.heartbeat() is False


async def _all(training: Training, job_id: str, after_cursor: int) -> list[JobEvent]:
    return [event async for event in training.watch(job_id, after_cursor)]


async def _so_far(training: Training, job_id: str, count: int) -> AsyncIterator[JobEvent]:
    """The first events of a job that still runs."""
    async for event in training.watch(job_id):
        yield event
        count -= 1
        if not count:
            break
