"""Limits of the training service's contract, and what it forbids, through the wire."""

import asyncio
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

import grpc
import pytest
import pytest_asyncio
from sqlalchemy import create_engine
from sqlalchemy.orm import Session
from tests.integration.registry.registries import blob_of, refusal
from tests.integration.training.hand import Hands, HandWorker
from tests.integration.training.trainings import CSV, Training, blobs_in, flowers, mlp_spec, served, upload

from penstock.api.dataset.v1 import dataset_service_pb2 as dataset_pb
from penstock.api.dataset.v1.dataset_pb2 import Column, ColumnType, Dataset, Split
from penstock.api.training.v1 import training_service_pb2 as pb
from penstock.api.training.v1.job_pb2 import Job, JobErrorKind, JobEvent, JobState, LogLine
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.training.datasets.store import DatasetStore
from penstock.training.tables import DatasetRow, JobRow

CLIENT_BYTES = 4 * 1024 * 1024
"""What a gRPC client takes unless told otherwise."""


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


async def test_bytes_that_another_creation_discards_are_asked_for_again(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()
    parse = DatasetStore._parse

    def held(self: DatasetStore, dataset: Dataset, content: IO[bytes], target: IO[bytes]) -> Dataset:
        go_on.wait(10)
        return parse(self, dataset, content, target)

    monkeypatch.setattr(DatasetStore, "_parse", held)
    rows = b"x\n7\nnone\n"
    integers = [Column(name="x", type=ColumnType.COLUMN_TYPE_INT64)]
    texts = [Column(name="x", type=ColumnType.COLUMN_TYPE_STRING)]
    calls = []
    for number, columns in enumerate((integers, texts), 1):
        calls.append(asyncio.create_task(refusal(training.dataset(rows, name=f"d{number}", columns=columns))))
        async with asyncio.timeout(10):
            while _settling() < number:  # noqa: ASYNC110  # a server has no event
                await asyncio.sleep(0.001)
    go_on.set()

    assert (await calls[0])[0] is grpc.StatusCode.INVALID_ARGUMENT
    code, text, _ = await calls[1]
    assert (code, "Send them again" in text) == (grpc.StatusCode.ABORTED, True)
    assert (await training.dataset(rows, name="d2", columns=texts)).row_count == 2


def _settling() -> int:
    """How many uploads have all their bytes, and are parsed or wait for it."""
    return sum("DatasetStore._settle" in repr(task.get_coro()) for task in asyncio.all_tasks())


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


def _header(**fields: object) -> dataset_pb.CreateDatasetRequest:
    dataset = Dataset(name="data", format=CSV)
    header = {"dataset": dataset, "content": blob_of(b"x\n1\n"), **fields}
    return dataset_pb.CreateDatasetRequest(header=dataset_pb.CreateDatasetHeader(**header))


def _columns(*names: str) -> dataset_pb.CreateDatasetRequest:
    columns = [Column(name=name, type=ColumnType.COLUMN_TYPE_INT64) for name in names]
    return _header(dataset=Dataset(name="data", format=CSV, columns=columns))


DIGEST = blob_of(b"").digest
FORBIDDEN = [
    ("CreateDataset", [], ["header"]),
    ("CreateDataset", [dataset_pb.CreateDatasetRequest(chunk=b"x")], ["header"]),
    ("CreateDataset", [_header(), dataset_pb.CreateDatasetRequest(chunk=bytes(2**20 + 1))], ["chunk"]),
    ("CreateDataset", [_header(), dataset_pb.CreateDatasetRequest(chunk=b"")], ["chunk"]),
    ("CreateDataset", [_header(offset=-1)], ["header.offset"]),
    ("CreateDataset", [_header(content=Blob(digest="md5:1"))], ["header.content.digest"]),
    ("CreateDataset", [_header(content=Blob(digest=DIGEST, size_bytes=2**31 + 1))], ["header.content.size_bytes"]),
    ("CreateDataset", [_columns("x" * 201)], ["header.dataset.columns[0].name"]),
    ("CreateDataset", [_columns("")], ["header.dataset.columns[0].name"]),
    ("CreateDataset", [_columns(*map(str, range(10_001)))], ["header.dataset.columns"]),
    ("QueryDatasetUpload", dataset_pb.QueryDatasetUploadRequest(digest="../x"), ["digest"]),
    ("GetDataset", dataset_pb.GetDatasetRequest(name="A"), ["name"]),
    ("ListDatasets", dataset_pb.ListDatasetsRequest(page_size=1001), ["page_size"]),
    ("DeleteDataset", dataset_pb.DeleteDatasetRequest(), ["name"]),
    ("CreateJob", pb.CreateJobRequest(), ["spec.dataset", "spec.registration.model", "spec.mlp"]),
    ("CreateJob", pb.CreateJobRequest(spec=mlp_spec(), request_id="x" * 65), ["request_id"]),
    ("GetJob", pb.GetJobRequest(), ["job_id"]),
    ("ListJobs", pb.ListJobsRequest(page_size=-1), ["page_size"]),
    ("CancelJob", pb.CancelJobRequest(), ["job_id"]),
]


@pytest.mark.parametrize(("method", "given", "fields"), FORBIDDEN)
async def test_what_the_contract_forbids_is_named(
    training: Training, method: str, given: object, fields: list[str]
) -> None:
    stub = training.datasets if hasattr(training.datasets, method) else training.jobs
    code, _, named = await refusal(getattr(stub, method)(given))

    assert (code, named) == (grpc.StatusCode.INVALID_ARGUMENT, fields)


@pytest.mark.parametrize(
    ("given", "code"),
    [
        (pb.WatchJobRequest(), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.WatchJobRequest(job_id="x", after_cursor=-1), grpc.StatusCode.INVALID_ARGUMENT),
        (pb.WatchJobRequest(job_id="x"), grpc.StatusCode.NOT_FOUND),
    ],
)
async def test_no_job_no_watch(training: Training, given: pb.WatchJobRequest, code: grpc.StatusCode) -> None:
    assert (await refusal(training.jobs.WatchJob(given).read()))[0] is code


async def test_the_service_numbers_and_dates_events_itself(training: Training, hands: Hands) -> None:
    await training.dataset(flowers())
    job = await training.job(mlp_spec())
    worker = HandWorker(training, (await hands.next()).lease)
    forged = JobEvent(cursor=1, attempt=9, time={"seconds": 1}, log_line=LogLine(text="x" * 8192))
    await worker.record(forged)
    await worker.fail(JobErrorKind.JOB_ERROR_KIND_SPEC, "no")

    events = [event async for event in training.watch(job.job_id)]
    (line,) = (event for event in events if event.HasField("log_line"))
    assert (line.attempt, line.log_line) == (1, forged.log_line)
    assert line.time.seconds > 1
    assert [event.cursor for event in events] == sorted({event.cursor for event in events})
    assert (await training.look(job.job_id)).attempts[0].error.message == "no"
