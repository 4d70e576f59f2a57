"""Limits of the training service's contract, through the wire."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from tests.integration.training.hand import Hands, HandWorker
from tests.integration.training.trainings import (
    Training,
    blob_of,
    blobs_in,
    flowers,
    mlp_spec,
    refusal,
    served,
    upload,
)

from penstock.api.dataset.v1 import dataset_service_pb2 as dataset_pb
from penstock.api.dataset.v1.dataset_pb2 import Column, ColumnType, Dataset, Split
from penstock.api.training.v1 import training_service_pb2 as pb
from penstock.api.training.v1.job_pb2 import Job, JobErrorKind, JobState
from penstock.training.tables import DatasetRow, JobRow

CLIENT_BYTES = 4 * 1024 * 1024
"""What a gRPC client takes unless told otherwise."""


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    made = Hands()
    monkeypatch.setattr("penstock.training.jobs.scheduler.worker_process", made.worker_process)
    return made


@pytest_asyncio.fixture
async def training(tmp_path: Path, hands: Hands) -> AsyncIterator[Training]:
    async with served(tmp_path) as running:
        yield running


async def test_a_page_is_what_any_client_takes(training: Training, tmp_path: Path) -> None:
    names = [f"c{number:05}" for number in range(10_000)]
    columns = [Column(name=name, type=ColumnType.COLUMN_TYPE_INT64) for name in names]
    expected = [f"wide-{number:02}" for number in range(60)]
    engine = create_engine(f"sqlite:///{tmp_path}/training/training.db")
    # Through the wire it would take too long.
    with Session(engine) as session, session.begin():
        for number, name in enumerate(expected):
            dataset = Dataset(name=name, columns=columns)
            digests = {"content_digest": "", "columns_digest": ""}
            session.add(DatasetRow(name=name, message=dataset.SerializeToString(), **digests))
            job = Job(job_id=name, spec=mlp_spec(feature_columns=names))
            row = {"job_id": name, "state": JobState.JOB_STATE_FAILED, "dataset": name, "model": "flowers"}
            session.add(JobRow(number=number + 1, message=job.SerializeToString(), **row))
    engine.dispose()

    datasets, token = [], ""
    while not datasets or token:
        request = dataset_pb.ListDatasetsRequest(page_size=1000, page_token=token)
        page = await training.datasets.ListDatasets(request)
        assert page.ByteSize() < CLIENT_BYTES
        datasets += [dataset.name for dataset in page.datasets]
        token = page.next_page_token
    jobs = []
    while not jobs or token:
        listed = await training.jobs.ListJobs(pb.ListJobsRequest(page_size=1000, page_token=token))
        assert listed.ByteSize() < CLIENT_BYTES
        jobs += [job.job_id for job in listed.jobs]
        token = listed.next_page_token

    assert (datasets, jobs) == (expected, expected[::-1])


async def test_tokens_of_other_lists_are_refused(training: Training) -> None:
    for token in ("no token", "Li4v"):
        request = dataset_pb.ListDatasetsRequest(page_token=token)
        assert (await refusal(training.datasets.ListDatasets(request)))[2] == ["page_token"]
    for token in ("no token", "YWI="):
        assert (await refusal(training.jobs.ListJobs(pb.ListJobsRequest(page_token=token))))[2] == ["page_token"]


async def test_too_many_rows_are_refused_and_not_kept(
    training: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.training.datasets.columns.MAX_ROWS", 2)
    assert (await training.dataset(b"x\n1\n2\n", name="enough")).row_count == 2
    kept = blobs_in(tmp_path, "datasets")

    code, text, fields = await refusal(training.dataset(b"x\n1\n2\n3\n"))

    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ["content"])
    assert "expected at most 2 rows" in text
    assert blobs_in(tmp_path, "datasets") == kept


async def test_a_column_is_read_once(training: Training) -> None:
    await training.dataset(b"x\n1\n")

    assert (await refusal(training.rows("data", Split.SPLIT_TRAIN, ["x", "x"])))[2] == ["columns"]


async def test_a_name_that_was_taken_meanwhile_leaves_no_bytes(training: Training, tmp_path: Path) -> None:
    late = b"x\n" + b"7\n" * 1000
    go_on = asyncio.Event()

    async def slowly() -> AsyncIterator[dataset_pb.CreateDatasetRequest]:
        requests = upload(late, chunk_bytes=1000)
        yield await anext(requests)
        yield await anext(requests)
        await go_on.wait()
        async for request in requests:
            yield request

    async def begun() -> bool:
        query = dataset_pb.QueryDatasetUploadRequest(digest=blob_of(late).digest)
        return (await training.datasets.QueryDatasetUpload(query)).committed_size_bytes == 1000

    assert not await begun()
    creating = asyncio.ensure_future(training.datasets.CreateDataset(slowly()))
    async with asyncio.timeout(10):
        while not await begun():  # noqa: ASYNC110  # a server has no event
            await asyncio.sleep(0.01)
    assert (await refusal(training.dataset(late)))[0] is grpc.StatusCode.ABORTED
    await training.dataset(b"x\n1\n")
    kept = blobs_in(tmp_path, "datasets")
    go_on.set()

    assert (await refusal(creating))[0] is grpc.StatusCode.ALREADY_EXISTS
    assert blobs_in(tmp_path, "datasets") == kept


async def test_a_full_queue_takes_no_more_jobs(
    training: Training, hands: Hands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.training.jobs.store.MAX_QUEUED", 2)
    await training.dataset(flowers())
    await training.job(mlp_spec())
    await hands.next()
    queued = [await training.job(mlp_spec()) for _ in range(2)]

    code, text, _ = await refusal(training.job(mlp_spec()))
    assert (code, "2 jobs are queued" in text) == (grpc.StatusCode.RESOURCE_EXHAUSTED, True)
    await training.cancel(queued[0].job_id)
    await training.job(mlp_spec())


async def test_what_has_ended_is_neither_cancelled_nor_forgotten(training: Training, hands: Hands) -> None:
    await training.dataset(flowers())
    job = await training.job(mlp_spec(), "mine")
    await HandWorker(training, (await hands.next()).lease).fail(JobErrorKind.JOB_ERROR_KIND_SPEC, "no")
    await training.datasets.DeleteDataset(dataset_pb.DeleteDatasetRequest(name="data"))

    code, text, _ = await refusal(training.cancel(job.job_id))
    assert (code, "is FAILED" in text) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    assert (await training.job(mlp_spec(), "mine")).job_id == job.job_id
