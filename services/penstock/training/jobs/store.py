"""Jobs in the database: creating, finding, and the transactions in which they change."""

import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from penstock.api.dataset.v1.dataset_pb2 import Dataset
from penstock.api.training.v1.job_pb2 import Job, JobEvent, JobSpec, JobState
from penstock.api.training.v1.training_service_pb2 import JobFilter
from penstock.rpc.errors import ExistsError, LimitExceededError, NotFoundError
from penstock.storage.blobs import BlobStore
from penstock.storage.database import Database
from penstock.storage.paging import read_page
from penstock.training.jobs.bell import Bell
from penstock.training.jobs.change import JobChange, now
from penstock.training.tables import FINAL_STATES, DatasetRow, EventRow, JobRow

MAX_QUEUED = 1000


class JobStore:
    """The one owner of job rows. Rings the bell after every change, and deletes the checkpoints that it left over."""

    def __init__(self, database: Database, checkpoints: BlobStore, bell: Bell) -> None:
        self._database = database
        self._checkpoints = checkpoints
        self._bell = bell

    async def by_request(self, request_id: str, spec: JobSpec) -> Job | None:
        """The job that a request made before. Raises `ExistsError` if its spec was another one."""
        if not request_id:
            return None
        async with self._database.snapshot() as session:
            return await _by_request(session, request_id, spec)

    async def create(self, spec: JobSpec, request_id: str, dataset: Dataset) -> Job:
        """Queues a job on a dataset that its spec was checked against.

        Raises `NotFoundError` if the dataset has been deleted or replaced since, `ExistsError` as `by_request`, and
        `LimitExceededError` if the queue is full.
        """
        try:
            async with self._database.transaction() as session:
                if request_id and (existing := await _by_request(session, request_id, spec)):
                    return existing
                return await self._insert(session, spec, request_id, dataset)
        except IntegrityError:
            # On PostgreSQL two calls with one request id can get here at once; the other one has made the job.
            if existing := await self.by_request(request_id, spec):
                return existing
            raise

    async def get(self, job_id: str) -> Job:
        """Raises `NotFoundError`."""
        return (await self.look(job_id))[0]

    async def look(self, job_id: str) -> tuple[Job, JobRow]:
        """A job and its row, to read. Raises `NotFoundError`."""
        async with self._database.snapshot() as session:
            row = await _row(session, job_id)
        return Job.FromString(row.message), row

    async def page(self, job_filter: JobFilter, before: int, size: int) -> tuple[list[Job], str]:
        """A page of jobs, newest first, those with a number under `before`, and the token of the next one."""
        query = select(JobRow).where(JobRow.number < before).order_by(JobRow.number.desc())
        if job_filter.states:
            query = query.where(JobRow.state.in_(set(job_filter.states)))
        if job_filter.dataset:
            query = query.where(JobRow.dataset == job_filter.dataset)
        if job_filter.model:
            query = query.where(JobRow.model == job_filter.model)
        async with self._database.snapshot() as session:
            return await read_page(
                session, query, size, lambda row: Job.FromString(row.message), lambda row: row.number
            )

    async def events(self, job_id: str, after_cursor: int, limit: int) -> tuple[list[JobEvent], bool]:
        """The next events after a cursor, and whether the job has ended with no more than these to come."""
        async with self._database.snapshot() as session:
            row = await _row(session, job_id)
            query = (
                select(EventRow.message)
                .where(EventRow.job_number == row.number, EventRow.cursor > after_cursor)
                .order_by(EventRow.cursor)
                .limit(limit)
            )
            events = [JobEvent.FromString(message) for message in await session.scalars(query)]
        return events, row.state in FINAL_STATES and len(events) < limit

    async def in_states(self, *states: "JobState.ValueType") -> list[str]:
        """The ids of the jobs in some states, oldest first."""
        query = select(JobRow.job_id).where(JobRow.state.in_(states)).order_by(JobRow.number)
        async with self._database.snapshot() as session:
            return list(await session.scalars(query))

    @asynccontextmanager
    async def changing(self, job_id: str) -> AsyncIterator[JobChange]:
        """A change of a job, committed when the block ends. Raises `NotFoundError`."""
        async with self._database.transaction() as session:
            row = await _row(session, job_id, for_update=True)
            change = JobChange(session, row)
            yield change
            change.save()
        self._bell.ring(job_id)
        for digest in change.superseded:
            await self._checkpoints.delete(digest)

    async def _insert(self, session: AsyncSession, spec: JobSpec, request_id: str, dataset: Dataset) -> Job:
        row = await session.get(DatasetRow, dataset.name, with_for_update={"read": True})
        if row is None or row.content_digest != dataset.content.digest:
            raise NotFoundError("dataset", dataset.name)
        queued = select(func.count()).select_from(JobRow).where(JobRow.state == JobState.JOB_STATE_QUEUED)
        if (await session.scalar(queued) or 0) >= MAX_QUEUED:
            raise LimitExceededError(f"{MAX_QUEUED:,} jobs are queued. Wait until some have ended, or cancel some.")
        job = Job(job_id=secrets.token_hex(8), spec=spec, dataset_digest=dataset.content.digest, create_time=now())
        job_row = JobRow(
            job_id=job.job_id,
            request_id=request_id or None,
            message=job.SerializeToString(),
            state=job.state,
            dataset=spec.dataset,
            model=spec.registration.model,
            last_cursor=0,
            interruptions=0,
        )
        session.add(job_row)
        await session.flush()
        change = JobChange(session, job_row)
        change.enter(JobState.JOB_STATE_QUEUED)
        change.save()
        return change.job


async def _row(session: AsyncSession, job_id: str, *, for_update: bool = False) -> JobRow:
    query = select(JobRow).where(JobRow.job_id == job_id)
    row = await session.scalar(query.with_for_update() if for_update else query)
    if row is None:
        raise NotFoundError("job", job_id[:64])
    return row


async def _by_request(session: AsyncSession, request_id: str, spec: JobSpec) -> Job | None:
    message = await session.scalar(select(JobRow.message).where(JobRow.request_id == request_id))
    if message is None:
        return None
    job = Job.FromString(message)
    if job.spec != spec:
        raise ExistsError(f"The request id {request_id!r} came with another spec before. Choose a new one.")
    return job
