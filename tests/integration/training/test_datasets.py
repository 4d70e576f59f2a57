"""DatasetService through the wire."""

import asyncio
import hashlib
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from tests.integration.registry.registries import blob_of, refusal
from tests.integration.training.trainings import (
    CSV,
    JSON_LINES,
    Training,
    audit_rows,
    blobs_in,
    flowers,
    mlp_spec,
    served,
    upload,
    values_of,
)

from penstock.api.dataset.v1 import dataset_service_pb2 as pb
from penstock.api.dataset.v1.dataset_pb2 import Column, ColumnType, Dataset, Split, SplitRecipe

INT64, FLOAT64, STRING = (
    ColumnType.COLUMN_TYPE_INT64,
    ColumnType.COLUMN_TYPE_FLOAT64,
    ColumnType.COLUMN_TYPE_STRING,
)
SPLITS = (Split.SPLIT_TRAIN, Split.SPLIT_VALIDATION, Split.SPLIT_TEST)
ROWS = [(number, number / 8, f"text {number}, with\nlines") for number in range(1000)]
TABLE = ("number,share,words\n" + "".join(f'{i},{f},"{s}"\n' for i, f, s in ROWS)).encode()


@pytest_asyncio.fixture
async def training(tmp_path: Path) -> AsyncIterator[Training]:
    async with served(tmp_path) as running:
        yield running


async def test_a_dataset_is_read_in_the_order_of_its_recipe(training: Training) -> None:
    split = SplitRecipe(train=0.5, validation=0.3, test=0.2, seed=11)
    created = await training.dataset(TABLE, chunk_bytes=1000, split=split, description="some rows")

    order = sorted(range(1000), key=lambda row: hashlib.sha256(struct.pack(">QQ", 11, row)).digest())
    expected = [ROWS[row] for row in order]
    assert [await training.rows("data", each) for each in SPLITS] == [
        expected[:500],
        expected[500:800],
        expected[800:],
    ]
    assert await training.rows("data", Split.SPLIT_TEST, ["words", "number"]) == [
        (words, number) for number, _, words in expected[800:]
    ]
    found = (await training.datasets.GetDataset(pb.GetDatasetRequest(name="data"))).dataset
    assert found == created
    assert list(found.columns) == [
        Column(name="number", type=INT64),
        Column(name="share", type=FLOAT64),
        Column(name="words", type=STRING),
    ]
    assert (found.row_count, found.split_counts.train, found.content) == (1000, 500, blob_of(TABLE))
    assert found.description == "some rows"


async def test_reading_goes_on_from_a_row_in_messages_that_any_client_takes(training: Training) -> None:
    wide = "words\n" + "".join(f"{row}{'x' * 60_000}\n" for row in range(40))
    await training.dataset(wide.encode(), name="wide", split=SplitRecipe(train=1))
    tall = "number\n" + "".join(f"{row}\n" for row in range(10_000))
    await training.dataset(tall.encode(), name="tall", split=SplitRecipe(train=1))

    whole = await training.rows("tall", Split.SPLIT_TRAIN)
    request = pb.ReadDatasetRequest(name="tall", split=Split.SPLIT_TRAIN, first_row=9_000)
    rest = [message async for message in training.datasets.ReadDataset(request)]
    assert [(number,) for message in rest for number in values_of(message.columns[0])] == whole[9_000:]
    request = pb.ReadDatasetRequest(name="tall", split=Split.SPLIT_TRAIN, first_row=10_001)
    assert [message async for message in training.datasets.ReadDataset(request)] == []
    request = pb.ReadDatasetRequest(name="tall", split=Split.SPLIT_TRAIN)
    assert [len(values_of(m.columns[0])) async for m in training.datasets.ReadDataset(request)] == [4096, 4096, 1808]
    request = pb.ReadDatasetRequest(name="wide", split=Split.SPLIT_TRAIN)
    sizes = [message.ByteSize() async for message in training.datasets.ReadDataset(request)]
    assert len(sizes) == 3
    assert max(sizes) < 1_100_000


async def test_json_lines_and_a_given_schema(training: Training) -> None:
    columns = [Column(name="b", type=FLOAT64), Column(name="a", type=STRING)]
    rows = b'{"a": "x", "b": 1}\n{"b": 2, "a": ""}\n'
    await training.dataset(rows, format=JSON_LINES, columns=columns, split=SplitRecipe(train=1))

    assert sorted(await training.rows("data", Split.SPLIT_TRAIN)) == [(1.0, "x"), (2.0, "")]


async def test_a_bad_row_is_refused_with_its_line_and_leaves_nothing(training: Training, tmp_path: Path) -> None:
    content = TABLE + b"7,none,x\n"
    columns = [Column(name="number", type=INT64), Column(name="share", type=FLOAT64), Column(name="words", type=STRING)]
    code, text, fields = await refusal(training.dataset(content, columns=columns))

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert fields == ["content.line[2002].share"]
    assert "expected a finite number; got 'none'" in text
    assert blobs_in(tmp_path, "datasets") == []
    assert list((tmp_path / "training" / "parsing").iterdir()) == []
    assert (await refusal(training.datasets.GetDataset(pb.GetDatasetRequest(name="data"))))[0] is (
        grpc.StatusCode.NOT_FOUND
    )


async def test_an_upload_that_was_cut_off_goes_on_where_it_stands(training: Training) -> None:
    async def cut(requests: AsyncIterator[pb.CreateDatasetRequest]) -> AsyncIterator[pb.CreateDatasetRequest]:
        for _ in range(6):
            yield await anext(requests)

    code, *_ = await refusal(training.datasets.CreateDataset(cut(upload(TABLE, chunk_bytes=1000))))
    assert code is grpc.StatusCode.INVALID_ARGUMENT

    digest = blob_of(TABLE).digest
    query = await training.datasets.QueryDatasetUpload(pb.QueryDatasetUploadRequest(digest=digest))
    assert query.committed_size_bytes == 5000
    code, text, _ = await refusal(training.dataset(TABLE, offset=4000))
    assert (code, "5000" in text) == (grpc.StatusCode.OUT_OF_RANGE, True)
    created = await training.dataset(TABLE, offset=5000)
    assert created.row_count == 1000


async def test_a_wrong_digest_discards_the_upload(training: Training) -> None:
    async def other(requests: AsyncIterator[pb.CreateDatasetRequest]) -> AsyncIterator[pb.CreateDatasetRequest]:
        async for request in requests:
            if request.WhichOneof("part") == "chunk":
                request.chunk = request.chunk[::-1]
            yield request

    code, *_ = await refusal(training.datasets.CreateDataset(other(upload(TABLE))))

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    query = await training.datasets.QueryDatasetUpload(pb.QueryDatasetUploadRequest(digest=blob_of(TABLE).digest))
    assert query.committed_size_bytes == 0


async def test_creating_again_returns_what_exists(training: Training, tmp_path: Path) -> None:
    created = await training.dataset(TABLE)

    assert await training.dataset(TABLE) == created
    assert await training.dataset(TABLE, columns=created.columns, split=created.split) == created
    for other in ({"content": TABLE + b"1,2,x\n"}, {"split": SplitRecipe(train=1)}, {"description": "x"}):
        code, text, _ = await refusal(training.dataset(**{"content": TABLE, **other}))
        assert (code, "'data'" in text) == (grpc.StatusCode.ALREADY_EXISTS, True)
    assert [action for action, *_ in audit_rows(tmp_path)] == ["dataset.create"]


async def test_one_upload_twice_at_once_makes_one_dataset(training: Training) -> None:
    results = await asyncio.gather(training.dataset(TABLE), training.dataset(TABLE), return_exceptions=True)

    codes = {result.code() for result in results if isinstance(result, grpc.aio.AioRpcError)}
    assert any(isinstance(result, Dataset) for result in results)
    assert codes <= {grpc.StatusCode.ABORTED, grpc.StatusCode.OUT_OF_RANGE}


async def test_a_dataset_is_deleted_with_the_bytes_that_no_other_one_has(training: Training, tmp_path: Path) -> None:
    await training.dataset(TABLE)
    await training.dataset(TABLE, name="same")
    await training.dataset(TABLE, name="other", split=SplitRecipe(train=1, seed=1))
    kept = blobs_in(tmp_path, "datasets")
    assert len(kept) == 3

    await training.datasets.DeleteDataset(pb.DeleteDatasetRequest(name="data"))
    assert blobs_in(tmp_path, "datasets") == kept
    await training.datasets.DeleteDataset(pb.DeleteDatasetRequest(name="same"))
    assert len(blobs_in(tmp_path, "datasets")) == 2
    assert len(await training.rows("other", Split.SPLIT_TRAIN)) == 1000
    await training.datasets.DeleteDataset(pb.DeleteDatasetRequest(name="other"))
    assert blobs_in(tmp_path, "datasets") == []
    code, *_ = await refusal(training.datasets.DeleteDataset(pb.DeleteDatasetRequest(name="data")))
    assert code is grpc.StatusCode.NOT_FOUND


async def test_a_dataset_in_use_is_not_deleted(tmp_path: Path) -> None:
    async with served(tmp_path, max_parallel_jobs=1) as training:
        await training.dataset(flowers())
        job = await training.job(mlp_spec())
        code, text, _ = await refusal(training.datasets.DeleteDataset(pb.DeleteDatasetRequest(name="data")))
        assert (code, job.job_id in text) == (grpc.StatusCode.FAILED_PRECONDITION, True)

        await training.cancel(job.job_id)
        await training.ended(job.job_id)
        await training.datasets.DeleteDataset(pb.DeleteDatasetRequest(name="data"))
        assert (await training.look(job.job_id)).dataset_digest == blob_of(flowers()).digest


async def test_datasets_are_listed_by_name_in_pages(training: Training) -> None:
    for name in ("c", "a", "d", "b"):
        await training.dataset(b"x\n1\n", name=name)

    first = await training.datasets.ListDatasets(pb.ListDatasetsRequest(page_size=3))
    assert [each.name for each in first.datasets] == ["a", "b", "c"]
    token = first.next_page_token
    second = await training.datasets.ListDatasets(pb.ListDatasetsRequest(page_size=3, page_token=token))
    assert ([each.name for each in second.datasets], second.next_page_token) == (["d"], "")


async def test_corrupted_rows_are_told_before_any_is_sent(training: Training, tmp_path: Path) -> None:
    await training.dataset(TABLE)
    digest = blob_of(TABLE).digest.removeprefix("sha256:")
    (columns,) = (
        path for path in (tmp_path / "training/datasets/blobs").rglob("*") if path.is_file() and path.name != digest
    )
    damaged = bytearray(columns.read_bytes())
    damaged[-1] ^= 1
    columns.write_bytes(damaged)

    code, text, _ = await refusal(training.rows("data", Split.SPLIT_TRAIN))

    assert code is grpc.StatusCode.DATA_LOSS
    assert columns.name in text


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no name": ({"name": ""}, "header.dataset.name"),
    "a path for a name": ({"name": "../x"}, "header.dataset.name"),
    "no format": ({"format": 0}, "header.dataset.format"),
    "an unknown format": ({"format": 9}, "header.dataset.format"),
    "a column without a type": ({"columns": [Column(name="a")]}, "header.dataset.columns[0].type"),
    "a column twice": ({"columns": [Column(name="a", type=1)] * 2}, "header.dataset.columns[1].name"),
    "shares beyond 1": ({"split": SplitRecipe(train=0.9, test=0.2)}, "header.dataset.split"),
    "no rows to learn from": ({"split": SplitRecipe(test=1)}, "header.dataset.split.train"),
    "a share that is no number": ({"split": SplitRecipe(train=float("nan"))}, "header.dataset.split.train"),
    "a long description": ({"description": "x" * 1001}, "header.dataset.description"),
    "no rows": ({"content": b"a,b\n"}, "content"),
}


@pytest.mark.parametrize(("fields", "field"), WRONG.values(), ids=WRONG)
async def test_wrong_fields_are_named(training: Training, fields: dict[str, Any], field: str) -> None:
    code, _, named = await refusal(training.dataset(**{"content": b"a\n1\n", "format": CSV, **fields}))

    assert code is grpc.StatusCode.INVALID_ARGUMENT
    assert field in named


async def test_reading_what_is_not_there(training: Training) -> None:
    await training.dataset(b"x\n1\n")

    assert (await refusal(training.rows("other", Split.SPLIT_TRAIN)))[0] is grpc.StatusCode.NOT_FOUND
    assert (await refusal(training.rows("data", 0)))[2] == ["split"]
    assert (await refusal(training.rows("data", Split.SPLIT_TRAIN, ["x", "y"])))[2] == ["columns[1]"]
