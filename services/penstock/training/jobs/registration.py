"""Takes finished jobs to the registry, however long it is away."""

import asyncio

import grpc
import structlog

from penstock.api.registry.v1 import registry_service_pb2 as pb
from penstock.api.registry.v1.model_pb2 import Model, Provenance, Version
from penstock.api.registry.v1.registry_service_pb2_grpc import RegistryServiceStub
from penstock.api.training.v1.job_pb2 import Job
from penstock.api.training.v1.worker_service_pb2 import CompleteAttemptRequest
from penstock.client.errors import PenstockError, answer
from penstock.training.jobs.lifecycle import Lifecycle
from penstock.training.jobs.patience import until_stored

# Worth another try, however often; any other answer is the registry's last word.
_TRANSIENT = {
    grpc.StatusCode.UNAVAILABLE,
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.RESOURCE_EXHAUSTED,
    grpc.StatusCode.ABORTED,
    grpc.StatusCode.CANCELLED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
}
_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
_CALL_TIMEOUT_S = 60.0

_log = structlog.get_logger("penstock.registration")


class Registrar:
    """One task for each job that is REGISTERING."""

    def __init__(self, lifecycle: Lifecycle, channel: grpc.aio.Channel) -> None:
        self._lifecycle = lifecycle
        self._registry = RegistryServiceStub(channel)
        self._tasks: set[asyncio.Task[None]] = set()

    def begin(self, job_id: str) -> None:
        """Registers a job's result in the background."""
        task = asyncio.create_task(self._register(job_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Stops; what is not registered is taken up at the next start."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _register(self, job_id: str) -> None:
        pause_s = _FIRST_PAUSE_S
        while (waiting := await self._lifecycle.completion(job_id)) is not None:
            try:
                version = await self._create_version(*waiting)
            except PenstockError as error:
                if error.code not in _TRANSIENT:
                    _log.warning("registration refused", job_id=job_id, error=error.message)
                    await self._refused(job_id, f"The registry refused the version: {error.message}")
                    return
                _log.warning("registration waits", job_id=job_id, error=error.message, retry_in_s=pause_s)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            else:
                await self._registered(job_id, version)
                return

    async def _registered(self, job_id: str, version: int) -> None:
        await until_stored(lambda: self._lifecycle.registered(job_id, version))

    async def _refused(self, job_id: str, message: str) -> None:
        await until_stored(lambda: self._lifecycle.registration_refused(job_id, message))

    async def _create_version(self, job: Job, completion: CompleteAttemptRequest) -> int:
        """Every step may be repeated: a crash between two of them makes no second version."""
        registration = job.spec.registration
        await self._ensure_model(registration.model)
        version = Version(
            model=registration.model,
            files=completion.files,
            signature=completion.signature,
            parity=completion.parity,
            metrics={f"test_{name}": value for name, value in completion.test_metrics.items()},
            labels=completion.labels,
            provenance=Provenance(job_id=job.job_id, dataset=job.spec.dataset, dataset_digest=job.dataset_digest),
            description=registration.description,
        )
        request = pb.CreateVersionRequest(version=version, request_id=job.job_id)
        number = (await answer(self._registry.CreateVersion(request, timeout=_CALL_TIMEOUT_S))).version.number
        if registration.alias:
            await answer(
                self._registry.SetAlias(
                    pb.SetAliasRequest(
                        model=registration.model,
                        alias=registration.alias,
                        version=number,
                        reason=f"job {job.job_id}",
                    ),
                    timeout=_CALL_TIMEOUT_S,
                )
            )
        return number

    async def _ensure_model(self, name: str) -> None:
        if await self._has_model(name):
            return
        try:
            request = pb.CreateModelRequest(model=Model(name=name))
            await answer(self._registry.CreateModel(request, timeout=_CALL_TIMEOUT_S))
        except PenstockError as error:
            # Somebody else was quicker and gave it a description.
            if error.code is not grpc.StatusCode.ALREADY_EXISTS:
                raise

    async def _has_model(self, name: str) -> bool:
        try:
            await answer(self._registry.GetModel(pb.GetModelRequest(name=name), timeout=_CALL_TIMEOUT_S))
        except PenstockError as error:
            if error.code is not grpc.StatusCode.NOT_FOUND:
                raise
            return False
        return True
