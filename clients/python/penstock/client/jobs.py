"""Training jobs."""

import asyncio
import uuid
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

import grpc

from penstock.api.training.v1 import job_pb2, training_service_pb2_grpc
from penstock.api.training.v1 import training_service_pb2 as pb
from penstock.client.artifacts import FIRST_PAUSE_S
from penstock.client.errors import PenstockError, answer
from penstock.client.pages import all_pages

if TYPE_CHECKING:
    from penstock.api.training.v1.training_service_pb2_grpc import TrainingServiceAsyncStub

# How often in a row a watch may be cut off without having brought anything.
WATCH_ATTEMPTS = 8


class AsyncJobs:
    """The TrainingService. Every method raises `PenstockError`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: TrainingServiceAsyncStub = training_service_pb2_grpc.TrainingServiceStub(channel)

    async def create(self, spec: job_pb2.JobSpec, request_id: str = "") -> job_pb2.Job:
        """Queues a job. Pass a `request_id` of your own where the call itself may be repeated."""
        request = pb.CreateJobRequest(spec=spec, request_id=request_id or uuid.uuid4().hex)
        return (await answer(self._stub.CreateJob(request))).job

    async def get(self, job_id: str) -> job_pb2.Job:
        return (await answer(self._stub.GetJob(pb.GetJobRequest(job_id=job_id)))).job

    async def list(self, job_filter: pb.JobFilter | None = None) -> Sequence[job_pb2.Job]:
        """All jobs that the filter lets pass, newest first."""
        call = self._stub.ListJobs
        return await all_pages(
            lambda token: call(pb.ListJobsRequest(page_size=1000, page_token=token, filter=job_filter)),
            lambda page: page.jobs,
        )

    async def cancel(self, job_id: str) -> job_pb2.Job:
        return (await answer(self._stub.CancelJob(pb.CancelJobRequest(job_id=job_id)))).job

    async def watch(self, job_id: str, after_cursor: int = 0) -> AsyncIterator[job_pb2.JobEvent]:
        """What happened to a job since a cursor and what happens, until it has ended. Goes on when cut off."""
        failures = 0
        ended = False
        while not ended:
            try:
                request = pb.WatchJobRequest(job_id=job_id, after_cursor=after_cursor)
                async for response in self._stub.WatchJob(request):
                    failures, after_cursor = 0, response.event.cursor
                    yield response.event
                ended = True
            except grpc.aio.AioRpcError as error:
                failures += 1
                if error.code() is not grpc.StatusCode.UNAVAILABLE or failures == WATCH_ATTEMPTS:
                    raise PenstockError.from_rpc(error) from error
                await asyncio.sleep(FIRST_PAUSE_S * 2**failures)
