"""What the servicers ask of jobs: the store, the state machine, the scheduler and the registrar together."""

from collections.abc import AsyncIterator, Sequence

from penstock.api.dataset.v1.dataset_pb2 import Dataset
from penstock.api.training.v1.job_pb2 import Job, JobError, JobEvent, JobSpec, MlpTask
from penstock.api.training.v1.worker_service_pb2 import (
    Checkpoint,
    CompleteAttemptRequest,
    Lease,
    StartAttemptResponse,
)
from penstock.rpc.errors import NotReadyError
from penstock.rpc.validation import validating
from penstock.training.datasets.store import DatasetStore
from penstock.training.families.mlp_spec import MAX_CLASSES
from penstock.training.jobs.bell import Bell
from penstock.training.jobs.lifecycle import Lifecycle
from penstock.training.jobs.registration import Registrar
from penstock.training.jobs.scheduler import Scheduler
from penstock.training.jobs.spec import check_classes, check_columns
from penstock.training.jobs.store import JobStore

_WATCH_EVENTS = 500


class Jobs:
    """Users' and workers' requests about jobs, their fields checked."""

    def __init__(
        self,
        datasets: DatasetStore,
        store: JobStore,
        lifecycle: Lifecycle,
        scheduler: Scheduler,
        registrar: Registrar,
        bell: Bell,
    ) -> None:
        self._datasets = datasets
        self._store = store
        self._lifecycle = lifecycle
        self._scheduler = scheduler
        self._registrar = registrar
        self._bell = bell

    async def create(self, spec: JobSpec, request_id: str) -> Job:
        """Queues a job. Raises `InvalidFieldError` if the spec does not fit the dataset, and as `JobStore.create`."""
        if existing := await self._store.by_request(request_id, spec):
            return existing
        dataset = await self._datasets.get(spec.dataset)
        with validating() as violations:
            check_columns(violations, spec, dataset)
        class_count = await self._class_count(spec, dataset)
        with validating() as violations:
            check_classes(violations, spec, dataset, class_count)
        job = await self._store.create(spec, request_id, dataset)
        self._scheduler.wake()
        return job

    async def cancel(self, job_id: str) -> Job:
        """Raises `NotFoundError`, or `WrongStateError` if it is too late."""
        job = await self._lifecycle.cancel(job_id)
        self._scheduler.cancel(job_id)
        return job

    async def watch(self, job_id: str, after_cursor: int) -> AsyncIterator[JobEvent]:
        """A job's events after a cursor, until it has ended.

        Raises `NotFoundError`, or `NotReadyError` when the server drains.
        """
        with self._bell.listening(job_id) as changed:
            while True:
                changed.clear()
                events, ended = await self._store.events(job_id, after_cursor, _WATCH_EVENTS)
                for event in events:
                    yield event
                    after_cursor = event.cursor
                if ended:
                    return
                if self._bell.draining:
                    raise NotReadyError("The training service is shutting down. Watch again from the last cursor.")
                if len(events) < _WATCH_EVENTS:
                    await changed.wait()

    async def start_attempt(self, lease: Lease) -> StartAttemptResponse:
        """Raises `LeaseLostError`, as all of a worker's requests do."""
        response = await self._lifecycle.start(lease)
        self._scheduler.renew(lease.job_id)
        return response

    async def heartbeat(self, lease: Lease) -> bool:
        cancelled = await self._lifecycle.cancel_requested(lease)
        self._scheduler.renew(lease.job_id)
        return cancelled

    async def record(self, lease: Lease, events: Sequence[JobEvent]) -> bool:
        cancelled = await self._lifecycle.record(lease, events)
        self._scheduler.renew(lease.job_id)
        return cancelled

    async def record_checkpoint(self, lease: Lease, checkpoint: Checkpoint) -> None:
        await self._lifecycle.record_checkpoint(lease, checkpoint)

    async def complete(self, lease: Lease, completion: CompleteAttemptRequest) -> None:
        if await self._lifecycle.complete(lease, completion):
            self._registrar.begin(lease.job_id)

    async def fail(self, lease: Lease, error: JobError) -> None:
        await self._lifecycle.fail(lease, error)

    async def _class_count(self, spec: JobSpec, dataset: Dataset) -> int:
        if spec.mlp.task != MlpTask.MLP_TASK_CLASSIFICATION:
            return 0
        return await self._datasets.count_classes(dataset.name, spec.mlp.label_column, MAX_CLASSES)
