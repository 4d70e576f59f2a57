"""A disk that fills up while a dataset comes in: nothing committed is lost, and the upload goes on afterwards."""

from pathlib import Path

import grpc
import pytest
from tests.integration.registry.registries import blob_of, refusal
from tests.integration.training.trainings import Child, connected

from penstock.api.dataset.v1 import dataset_service_pb2 as pb

# Written as rows it takes about 0.9 MB, as 8-byte columns 4.8 MB.
TABLE = b"a,b,c,d,e,f\n" + b"1,2,3,4,5,6\n" * 100_000


@pytest.mark.parametrize("limit", [700_000, 2_500_000], ids=["while it uploads", "while its rows are prepared"])
async def test_an_upload_goes_on_after_the_disk_was_full(tmp_path: Path, limit: int) -> None:
    digest = blob_of(TABLE).digest
    full = Child(tmp_path, file_limit=limit)
    try:
        async with connected(await full.address()) as training:
            code, text, _ = await refusal(training.dataset(TABLE, chunk_bytes=100_000))
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "disk is full" in text
            assert "resume" in text
            query = await training.datasets.QueryDatasetUpload(pb.QueryDatasetUploadRequest(digest=digest))
            committed = query.committed_size_bytes
            assert committed == min(limit, len(TABLE))
    finally:
        full.kill()

    free = Child(tmp_path)
    try:
        async with connected(await free.address()) as training:
            query = await training.datasets.QueryDatasetUpload(pb.QueryDatasetUploadRequest(digest=digest))
            assert query.committed_size_bytes == committed
            assert (await training.dataset(TABLE, offset=committed)).row_count == 100_000
    finally:
        free.kill()
