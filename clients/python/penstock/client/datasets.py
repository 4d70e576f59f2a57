"""Datasets: rows up, rows down."""

from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import grpc
import numpy as np

from penstock.api.dataset.v1 import dataset_pb2, dataset_service_pb2_grpc
from penstock.api.dataset.v1 import dataset_service_pb2 as pb
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.client.artifacts import ATTEMPTS, Progress, describe_file, file_chunks, pause_or_raise, unobserved
from penstock.client.errors import PenstockError, answer
from penstock.client.pages import all_pages
from penstock.client.tensors import Array

if TYPE_CHECKING:
    from penstock.api.dataset.v1.dataset_service_pb2_grpc import DatasetServiceAsyncStub


class AsyncDatasets:
    """The DatasetService. Every method raises `PenstockError`."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self._stub: DatasetServiceAsyncStub = dataset_service_pb2_grpc.DatasetServiceStub(channel)

    async def create(
        self, dataset: dataset_pb2.Dataset, path: Path, progress: Progress = unobserved
    ) -> dataset_pb2.Dataset:
        """Uploads a file of rows as a dataset, going on after a broken connection where the upload stands."""
        content = await describe_file(path)
        for attempt in range(ATTEMPTS):
            try:
                query = pb.QueryDatasetUploadRequest(digest=content.digest)
                committed = (await answer(self._stub.QueryDatasetUpload(query))).committed_size_bytes
                requests = _create_requests(dataset, content, path, committed, progress)
                return (await answer(self._stub.CreateDataset(requests))).dataset
            except PenstockError as error:
                await pause_or_raise(error, attempt)
        raise AssertionError("pause_or_raise raises after the last attempt")

    async def get(self, name: str) -> dataset_pb2.Dataset:
        return (await answer(self._stub.GetDataset(pb.GetDatasetRequest(name=name)))).dataset

    async def list(self) -> Sequence[dataset_pb2.Dataset]:
        """All datasets, by name."""
        call = self._stub.ListDatasets
        return await all_pages(
            lambda token: call(pb.ListDatasetsRequest(page_size=1000, page_token=token)), lambda page: page.datasets
        )

    async def delete(self, name: str) -> None:
        await answer(self._stub.DeleteDataset(pb.DeleteDatasetRequest(name=name)))

    async def read(
        self, name: str, split: "dataset_pb2.Split.ValueType", columns: Sequence[str] = ()
    ) -> dict[str, Array]:
        """The rows of one split, an array for each column: int64, float64, or object holding `str`."""
        wanted = list(columns) or [column.name for column in (await self.get(name)).columns]
        parts: list[list[Array]] = [[] for _ in wanted]
        request = pb.ReadDatasetRequest(name=name, split=split, columns=wanted)
        try:
            async for response in self._stub.ReadDataset(request):
                for part, values in zip(parts, response.columns, strict=True):
                    part.append(_column_array(values))
        except grpc.aio.AioRpcError as error:
            raise PenstockError.from_rpc(error) from error
        return {
            column: np.concatenate(part) if part else np.empty(0) for column, part in zip(wanted, parts, strict=True)
        }


async def _create_requests(
    dataset: dataset_pb2.Dataset, content: Blob, path: Path, offset: int, progress: Progress
) -> AsyncIterator[pb.CreateDatasetRequest]:
    header = pb.CreateDatasetHeader(dataset=dataset, content=content, offset=offset)
    yield pb.CreateDatasetRequest(header=header)
    async for chunk in file_chunks(path, offset, progress):
        yield pb.CreateDatasetRequest(chunk=chunk)


def _column_array(values: pb.ColumnValues) -> Array:
    match values.WhichOneof("values"):
        case "int64_values":
            return np.array(values.int64_values.values, np.int64)
        case "float64_values":
            return np.array(values.float64_values.values, np.float64)
        case _:
            return np.array(values.string_values.values, object)
