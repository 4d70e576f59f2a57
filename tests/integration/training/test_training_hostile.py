"""Requests and rows that are made to hurt the training service."""

import asyncio
import gc
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest
import pytest_asyncio
from tests.integration.registry.registries import blob_of, refusal
from tests.integration.training.trainings import Training, served

from penstock.api.dataset.v1 import dataset_service_pb2 as pb
from penstock.api.dataset.v1.dataset_pb2 import ColumnType, Dataset, DatasetFormat, SplitRecipe
from penstock.api.training.v1.job_pb2 import JobState
from penstock.api.training.v1.training_service_pb2 import JobFilter, ListJobsRequest, WatchJobRequest

INFINITY = float("inf")


@pytest_asyncio.fixture
async def training(tmp_path: Path) -> AsyncIterator[Training]:
    async with served(tmp_path) as running:
        yield running


@pytest.mark.parametrize("share", [(INFINITY, -INFINITY, 1.0), (1e308, 1e308, 1e308), (float("nan"), 0.0, 1.0)])
async def test_shares_that_have_no_sum_are_refused_by_name(
    training: Training, share: tuple[float, float, float]
) -> None:
    split = SplitRecipe(train=share[0], validation=share[1], test=share[2])
    dataset = Dataset(name="data", format=DatasetFormat.DATASET_FORMAT_CSV, split=split)
    header = pb.CreateDatasetHeader(dataset=dataset, content=blob_of(b"a\n1\n"))
    code, _, fields = await refusal(training.datasets.CreateDataset(iter([pb.CreateDatasetRequest(header=header)])))
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert "header.dataset.split.train" in fields


@pytest.mark.parametrize(
    "value",
    ["1" * 65_000 + "x", "1" * 32_000 + "." + "1" * 32_000 + "x", " " * 65_000 + "x", "1e" * 32_000, "." * 65_000],
    ids=lambda value: value[:2],
)
async def test_a_value_that_takes_a_slow_pattern_minutes_takes_no_time(training: Training, value: str) -> None:
    """The pattern for numbers held the whole process for a minute and a half over one line of digits."""
    async with asyncio.timeout(5):
        created = await training.dataset(f"a\n{value}\n".encode())
    assert [column.type for column in created.columns] == [ColumnType.COLUMN_TYPE_STRING]


async def test_a_filter_of_half_a_million_states_is_one_of_a_few(training: Training) -> None:
    """A database binds only so many values a statement."""
    states = [JobState.JOB_STATE_QUEUED, JobState.JOB_STATE_RUNNING] * 250_000
    response = await training.jobs.ListJobs(ListJobsRequest(filter=JobFilter(states=states)))
    assert list(response.jobs) == []


async def test_watchers_who_leave_a_job_that_is_not_there_leave_nothing(training: Training) -> None:
    errors: list[str] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: errors.append(str(context)))
    calls = [training.jobs.WatchJob(WatchJobRequest(job_id="none")) for _ in range(200)]
    reading = [asyncio.create_task(call.read()) for call in calls]
    await asyncio.sleep(0.02)
    for call in calls:
        call.cancel()
    await asyncio.wait(reading)
    answered = [task for task in reading if not task.cancelled()]
    assert all(task.exception() for task in answered)
    # Whoever comes after them is answered as ever.
    code, _, _ = await refusal(anext(aiter(training.jobs.WatchJob(WatchJobRequest(job_id="none")))))
    assert code is grpc.StatusCode.NOT_FOUND
    gc.collect()
    assert errors == []
