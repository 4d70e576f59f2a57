"""A dataset's splits, read over the wire into arrays."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import grpc
import numpy as np

from penstock.api.dataset.v1 import dataset_service_pb2 as pb
from penstock.api.dataset.v1.dataset_pb2 import ColumnType, Dataset, Split
from penstock.client.errors import PenstockError
from penstock.training.families.interface import Column
from penstock.training.worker.link import persistently

if TYPE_CHECKING:
    from penstock.api.dataset.v1.dataset_service_pb2_grpc import DatasetServiceAsyncStub

_EMPTY: dict[int, Column] = {
    ColumnType.COLUMN_TYPE_INT64: np.empty(0, np.int64),
    ColumnType.COLUMN_TYPE_FLOAT64: np.empty(0, np.float64),
    ColumnType.COLUMN_TYPE_STRING: [],
}


async def read_split(
    stub: "DatasetServiceAsyncStub",
    dataset: Dataset,
    split: "Split.ValueType",
    columns: Sequence[str],
    on_rows: Callable[[int], None],
) -> dict[str, Column]:
    """A split's columns by name, in the order of the split recipe; goes on where a broken connection left off.

    `on_rows` is told how many rows came with each message. Raises `PenstockError`.
    """
    types = {column.name: column.type for column in dataset.columns}
    pieces: dict[str, list[Column]] = {name: [_EMPTY[types[name]]] for name in columns}
    rows_read = 0

    async def read_rest() -> None:
        nonlocal rows_read
        request = pb.ReadDatasetRequest(name=dataset.name, split=split, columns=columns, first_row=rows_read)
        try:
            async for message in stub.ReadDataset(request):
                for name, values in zip(columns, message.columns, strict=True):
                    pieces[name].append(_piece(values))
                count = len(pieces[columns[0]][-1])
                rows_read += count
                on_rows(count)
        except grpc.aio.AioRpcError as error:
            raise PenstockError.from_rpc(error) from error

    await persistently(read_rest)
    return {name: _joined(parts) for name, parts in pieces.items()}


def _piece(values: pb.ColumnValues) -> Column:
    match values.WhichOneof("values"):
        case "int64_values":
            return np.array(values.int64_values.values, np.int64)
        case "float64_values":
            return np.array(values.float64_values.values, np.float64)
        case _:
            return list(values.string_values.values)


def _joined(parts: Sequence[Column]) -> Column:
    if isinstance(parts[0], list):
        return [value for part in parts for value in part]
    return np.concatenate(parts)
