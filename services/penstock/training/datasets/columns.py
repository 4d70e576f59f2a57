"""The parsed rows of a dataset, as they lie on disk: in the order of the split recipe, so that a split is one slice.

One file of four arrays in NumPy's own format (NEP 1, never pickled), one after another: `int64` [rows, INT64 columns],
`float64` [rows, FLOAT64 columns], `spans` int64 [rows, STRING columns, 2], and `text` uint8, the UTF-8 of every string;
a span is where a string begins and ends in it.
"""

import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from penstock.api.dataset.v1.dataset_pb2 import Column, ColumnType
from penstock.api.dataset.v1.dataset_service_pb2 import (
    ColumnValues,
    Float64Values,
    Int64Values,
    ReadDatasetResponse,
    StringValues,
)
from penstock.rpc.errors import InvalidFieldError
from penstock.training.datasets.values import Value

MAX_ROWS = 20_000_000
MAX_MESSAGE_ROWS = 4096
# Well under the 4 MiB that every gRPC client takes by default.
MESSAGE_BYTES = 1024 * 1024

_BLOCK_BYTES = 4 * 1024 * 1024
_NUMBER_BYTES = 10


def write_columns(
    target: IO[bytes],
    batches: Iterable[list[list[Value]]],
    columns: Sequence[Column],
    order: Callable[[int], NDArray[np.int64]],
    folder: Path,
) -> int:
    """Writes the rows of `batches` to `target`, sorted by `order(number of rows)`, and tells their number.

    Spills to files in `folder`; in memory stand one batch and the order.

    Raises `InvalidFieldError` if there are more than `MAX_ROWS` rows, `OSError` if the disk is full.
    """
    with (
        tempfile.TemporaryFile(dir=folder) as integers,
        tempfile.TemporaryFile(dir=folder) as floats,
        tempfile.TemporaryFile(dir=folder) as spans,
        tempfile.TemporaryFile(dir=folder) as text,
    ):
        row_count = 0
        for batch in batches:
            row_count += len(batch[0])
            if row_count > MAX_ROWS:
                raise InvalidFieldError.of("content", f"expected at most {MAX_ROWS:,} rows; got more. Split it")
            _write_numbers(integers, _of_type(batch, columns, ColumnType.COLUMN_TYPE_INT64), np.int64)
            _write_numbers(floats, _of_type(batch, columns, ColumnType.COLUMN_TYPE_FLOAT64), np.float64)
            _write_texts(spans, text, _of_type(batch, columns, ColumnType.COLUMN_TYPE_STRING))
        rows = order(row_count)
        _copy_sorted(integers, target, rows, np.dtype(np.int64), (_count(columns, ColumnType.COLUMN_TYPE_INT64),))
        _copy_sorted(floats, target, rows, np.dtype(np.float64), (_count(columns, ColumnType.COLUMN_TYPE_FLOAT64),))
        _copy_sorted(spans, target, rows, np.dtype(np.int64), (_count(columns, ColumnType.COLUMN_TYPE_STRING), 2))
        text.flush()
        _write_header(target, np.dtype(np.uint8), (text.tell(),))
        text.seek(0)
        shutil.copyfileobj(text, target, _BLOCK_BYTES)
    target.flush()
    return row_count


class ColumnFile:
    """Reads what `write_columns` wrote. The file must stay open, and its bytes must have been checked."""

    def __init__(self, file: IO[bytes], columns: Sequence[Column]) -> None:
        file.seek(0)
        self._integers, self._floats, self._spans, self._text = (_mapped(file) for _ in range(4))
        self._types = {column.name: column.type for column in columns}
        # Where a column stands among those of its type.
        self._places: dict[str, int] = {}
        seen: Counter[int] = Counter()
        for column in columns:
            self._places[column.name] = seen[column.type]
            seen[column.type] += 1

    def message(self, names: Sequence[str], start: int, stop: int) -> ReadDatasetResponse:
        """The rows from `start`, as many as a message may hold but none from `stop` on, at least one."""
        stop = start + self._fitting(names, start, min(stop, start + MAX_MESSAGE_ROWS))
        return ReadDatasetResponse(columns=[self._values(name, start, stop) for name in names])

    def distinct(self, name: str, rows: range, limit: int) -> int:
        """How many distinct values a column of type INT64 or STRING has in some rows; counting ends above `limit`."""
        found: set[int | str] = set()
        for start in range(rows.start, rows.stop, MAX_MESSAGE_ROWS):
            values = self._values(name, start, min(start + MAX_MESSAGE_ROWS, rows.stop))
            found.update(values.int64_values.values, values.string_values.values)
            if len(found) > limit:
                break
        return len(found)

    def _fitting(self, names: Sequence[str], start: int, stop: int) -> int:
        """How many of the rows fit into one message."""
        texts = [self._places[name] for name in names if self._types[name] == ColumnType.COLUMN_TYPE_STRING]
        row_bytes = np.full(stop - start, _NUMBER_BYTES * len(names), np.int64)
        if texts:
            spans = self._spans[start:stop][:, texts]
            row_bytes += (spans[:, :, 1] - spans[:, :, 0]).sum(axis=1)
        return max(1, int(np.searchsorted(np.cumsum(row_bytes), MESSAGE_BYTES, side="right")))

    def _values(self, name: str, start: int, stop: int) -> ColumnValues:
        place = self._places[name]
        match self._types[name]:
            case ColumnType.COLUMN_TYPE_INT64:
                return ColumnValues(int64_values=Int64Values(values=self._integers[start:stop, place].tolist()))
            case ColumnType.COLUMN_TYPE_FLOAT64:
                return ColumnValues(float64_values=Float64Values(values=self._floats[start:stop, place].tolist()))
            case _:
                spans = self._spans[start:stop, place].tolist()
                texts = [self._text[begin:end].tobytes().decode() for begin, end in spans]
                return ColumnValues(string_values=StringValues(values=texts))


def _of_type(
    batch: list[list[Value]], columns: Sequence[Column], column_type: "ColumnType.ValueType"
) -> list[list[Value]]:
    return [values for values, column in zip(batch, columns, strict=True) if column.type == column_type]


def _count(columns: Sequence[Column], column_type: "ColumnType.ValueType") -> int:
    return sum(column.type == column_type for column in columns)


def _write_numbers(file: IO[bytes], batch: list[list[Value]], dtype: type[np.generic]) -> None:
    if batch:
        file.write(np.array(batch, dtype).T.tobytes())


def _write_texts(spans: IO[bytes], text: IO[bytes], batch: list[list[Value]]) -> None:
    if not batch:
        return
    begin = text.tell()
    encoded = [[str(value).encode() for value in row] for row in zip(*batch, strict=True)]
    lengths = np.array([[len(value) for value in row] for row in encoded], np.int64)
    ends = begin + np.cumsum(lengths).reshape(lengths.shape)
    spans.write(np.stack([ends - lengths, ends], axis=2).tobytes())
    text.write(b"".join(value for row in encoded for value in row))


def _copy_sorted(
    source: IO[bytes], target: IO[bytes], rows: NDArray[np.int64], dtype: np.dtype[Any], row_shape: tuple[int, ...]
) -> None:
    shape = (len(rows), *row_shape)
    _write_header(target, dtype, shape)
    if 0 in shape:
        return
    source.flush()
    values = np.memmap(source, dtype, "r", shape=shape)
    block_rows = max(1, _BLOCK_BYTES // values[0].nbytes)
    for start in range(0, len(rows), block_rows):
        target.write(values[rows[start : start + block_rows]].tobytes())


def _write_header(target: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": dtype.newbyteorder("<").str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(target, header)


def _mapped(file: IO[bytes]) -> NDArray[Any]:
    """The array that begins at the file's position, which moves behind it."""
    np.lib.format.read_magic(file)
    shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    if 0 in shape:
        return np.empty(shape, dtype)
    offset = file.tell()
    array: NDArray[Any] = np.memmap(file, dtype, "r", offset=offset, shape=shape)
    file.seek(offset + array.nbytes)
    return array
