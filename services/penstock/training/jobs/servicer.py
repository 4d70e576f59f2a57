"""The TrainingService and the WorkerService over the jobs."""

import math
from collections.abc import AsyncIterator

from penstock.api.training.v1 import training_service_pb2 as pb
from penstock.api.training.v1 import training_service_pb2_grpc as rpc
from penstock.api.training.v1 import worker_service_pb2 as worker_pb
from penstock.api.training.v1 import worker_service_pb2_grpc as worker_rpc
from penstock.api.training.v1.job_pb2 import JobErrorKind, JobEvent, JobState, Phase
from penstock.rpc.server import Service
from penstock.rpc.validation import Violations, page_size, validating
from penstock.storage.artifacts import checked_blob
from penstock.storage.paging import number_token
from penstock.training.families.mlp_spec import MAX_CLASSES
from penstock.training.jobs.process import MAX_LINE_BYTES
from penstock.training.jobs.service import Jobs
from penstock.training.jobs.spec import check_spec
from penstock.training.jobs.store import JobStore
from penstock.training.settings import TrainingSettings

MAX_EVENTS = 1000
_MAX_METRICS = 100
_MAX_ERROR_TEXT = 8 * 1024
# A worker that dies or loses its lease cannot say so, and registering is not its work.
_WORKER_ERRORS = {
    JobErrorKind.JOB_ERROR_KIND_SPEC,
    JobErrorKind.JOB_ERROR_KIND_PARITY,
    JobErrorKind.JOB_ERROR_KIND_INTERNAL,
    JobErrorKind.JOB_ERROR_KIND_DIVERGED,
}


class TrainingServicer(rpc.TrainingServiceServicer):
    """Translates between users and the jobs."""

    def __init__(self, jobs: Jobs, store: JobStore) -> None:
        self._jobs = jobs
        self._store = store

    def service(self) -> Service:
        return Service(pb.DESCRIPTOR, lambda server: rpc.add_TrainingServiceServicer_to_server(self, server))

    async def CreateJob(self, request: pb.CreateJobRequest, context: object) -> pb.CreateJobResponse:
        with validating() as violations:
            violations.request_id("request_id", request.request_id)
            check_spec(violations, request.spec)
        return pb.CreateJobResponse(job=await self._jobs.create(request.spec, request.request_id))

    async def GetJob(self, request: pb.GetJobRequest, context: object) -> pb.GetJobResponse:
        _require_job_id(request.job_id)
        return pb.GetJobResponse(job=await self._store.get(request.job_id))

    async def ListJobs(self, request: pb.ListJobsRequest, context: object) -> pb.ListJobsResponse:
        with validating() as violations:
            size = page_size(violations, request.page_size)
            before = number_token(violations, request.page_token)
            for index, state in enumerate(request.filter.states):
                violations.require(
                    state != JobState.JOB_STATE_UNSPECIFIED and state in JobState.values(),
                    f"filter.states[{index}]",
                    f"expected a state of a job; got {state}",
                )
        jobs, token = await self._store.page(request.filter, before, size)
        return pb.ListJobsResponse(jobs=jobs, next_page_token=token)

    async def CancelJob(self, request: pb.CancelJobRequest, context: object) -> pb.CancelJobResponse:
        _require_job_id(request.job_id)
        return pb.CancelJobResponse(job=await self._jobs.cancel(request.job_id))

    async def WatchJob(self, request: pb.WatchJobRequest, context: object) -> AsyncIterator[pb.WatchJobResponse]:
        with validating() as violations:
            violations.require(bool(request.job_id), "job_id", "expected the id of a job; got nothing")
            cursor = request.after_cursor
            violations.require(cursor >= 0, "after_cursor", f"expected 0 or more; got {cursor}")
        async for event in self._jobs.watch(request.job_id, request.after_cursor):
            yield pb.WatchJobResponse(event=event)


class WorkerServicer(worker_rpc.WorkerServiceServicer):
    """Translates between workers and the jobs."""

    def __init__(self, jobs: Jobs, settings: TrainingSettings) -> None:
        self._jobs = jobs
        self._settings = settings

    def service(self) -> Service:
        return Service(
            worker_pb.DESCRIPTOR, lambda server: worker_rpc.add_WorkerServiceServicer_to_server(self, server)
        )

    async def StartAttempt(
        self, request: worker_pb.StartAttemptRequest, context: object
    ) -> worker_pb.StartAttemptResponse:
        response = await self._jobs.start_attempt(request.lease)
        response.lease_duration.FromMicroseconds(int(self._settings.lease_s * 1e6))
        response.registry_address = self._settings.registry
        return response

    async def Heartbeat(self, request: worker_pb.HeartbeatRequest, context: object) -> worker_pb.HeartbeatResponse:
        return worker_pb.HeartbeatResponse(cancel_requested=await self._jobs.heartbeat(request.lease))

    async def RecordEvents(
        self, request: worker_pb.RecordEventsRequest, context: object
    ) -> worker_pb.RecordEventsResponse:
        with validating() as violations:
            violations.within("events", len(request.events), 0, MAX_EVENTS)
            for index, event in enumerate(request.events):
                _check_event(violations, f"events[{index}]", event)
        return worker_pb.RecordEventsResponse(cancel_requested=await self._jobs.record(request.lease, request.events))

    async def RecordCheckpoint(
        self, request: worker_pb.RecordCheckpointRequest, context: object
    ) -> worker_pb.RecordCheckpointResponse:
        with validating() as violations:
            checked_blob(violations, "checkpoint.content", request.checkpoint.content)
            epoch = request.checkpoint.epoch
            violations.require(epoch > 0, "checkpoint.epoch", f"expected more than 0; got {epoch}")
        await self._jobs.record_checkpoint(request.lease, request.checkpoint)
        return worker_pb.RecordCheckpointResponse()

    async def CompleteAttempt(
        self, request: worker_pb.CompleteAttemptRequest, context: object
    ) -> worker_pb.CompleteAttemptResponse:
        with validating() as violations:
            violations.require("model.onnx" in request.files, "files", "expected 'model.onnx' among them")
            for name, blob in request.files.items():
                checked_blob(violations, f"files[{name!r}]", blob)
            violations.require(bool(request.signature.outputs), "signature", "expected inputs and outputs")
            violations.require(bool(request.parity.cases), "parity", "expected at least one case")
            violations.within("labels", len(request.labels), 0, MAX_CLASSES)
            _check_metrics(violations, "test_metrics", dict(request.test_metrics))
        completion = worker_pb.CompleteAttemptRequest()
        completion.CopyFrom(request)
        completion.ClearField("lease")
        await self._jobs.complete(request.lease, completion)
        return worker_pb.CompleteAttemptResponse()

    async def FailAttempt(
        self, request: worker_pb.FailAttemptRequest, context: object
    ) -> worker_pb.FailAttemptResponse:
        with validating() as violations:
            violations.require(
                request.error.kind in _WORKER_ERRORS,
                "error.kind",
                f"expected SPEC, PARITY, INTERNAL or DIVERGED; got {request.error.kind}",
            )
            violations.within("error.message", len(request.error.message), 1, _MAX_ERROR_TEXT)
        await self._jobs.fail(request.lease, request.error)
        return worker_pb.FailAttemptResponse()


def _require_job_id(job_id: str) -> None:
    with validating() as violations:
        violations.require(bool(job_id), "job_id", "expected the id of a job; got nothing")


def _check_event(violations: Violations, field: str, event: JobEvent) -> None:
    match event.WhichOneof("event"):
        case "epoch_metrics":
            metrics = event.epoch_metrics
            violations.within(f"{field}.epoch_metrics.epoch", metrics.epoch, 1, max(metrics.epoch_count, 1))
            _check_metrics(violations, f"{field}.epoch_metrics.values", dict(metrics.values))
        case "progress":
            violations.within(f"{field}.progress.fraction", event.progress.fraction, 0, 1)
            violations.require(
                event.progress.phase in Phase.values(), f"{field}.progress.phase", "expected a phase of an attempt"
            )
        case "log_line":
            size = len(event.log_line.text.encode())
            violations.within(f"{field}.log_line.text", size, 0, MAX_LINE_BYTES)
        case _:
            violations.add(field, "expected epoch_metrics, progress or log_line: other events are the service's")


def _check_metrics(violations: Violations, field: str, metrics: dict[str, float]) -> None:
    violations.within(field, len(metrics), 0, _MAX_METRICS)
    for name, value in metrics.items():
        violations.require(0 < len(name) <= 100, field, "expected names of 1 to 100 characters")
        violations.require(math.isfinite(value), f"{field}[{name!r}]", f"expected a finite number; got {value}")
