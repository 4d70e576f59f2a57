"""Rows out of a dataset's bytes: CSV (RFC 4180) and JSON Lines.

Reads line by line, so memory is bounded by the line limit. Every refusal names the physical line, counted from 1, on
which the row begins, and the column where there is one: `content.line[17].pixel_3`.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from penstock.api.dataset.v1.dataset_pb2 import Column, ColumnType, DatasetFormat
from penstock.rpc.errors import InvalidFieldError
from penstock.training.datasets.values import Value, merged_type, mismatch, parser, shown, suggested_type

MAX_LINE_BYTES = 64 * 1024
MAX_COLUMNS = 10_000
MAX_COLUMN_NAME = 200
BATCH_ROWS = 1024

_BYTE_ORDER_MARK = "\ufeff"


class Row(NamedTuple):
    """One row as it was read: the line it begins on, and its values in the order of the columns."""

    line: int
    values: Sequence[Any]


def read_schema(raw: Iterator[bytes], data_format: "DatasetFormat.ValueType") -> list[Column]:
    """The columns of a file, given as its lines: the names as they stand, each type the narrowest one that fits.

    No line need be longer than `MAX_LINE_BYTES` + 1: what follows it may come as further ones.
    An empty cell, NaN and the like do not make text of a column of numbers; parsing refuses them then.
    """
    names, rows = _rows(raw, data_format, None)
    types = [ColumnType.COLUMN_TYPE_UNSPECIFIED] * len(names)
    for row in rows:
        for index, value in enumerate(row.values):
            if types[index] != ColumnType.COLUMN_TYPE_STRING:
                types[index] = merged_type(data_format, types[index], suggested_type(data_format, value))
    return [
        Column(name=name, type=column_type or ColumnType.COLUMN_TYPE_STRING)
        for name, column_type in zip(names, types, strict=True)
    ]


def read_batches(
    raw: Iterator[bytes], data_format: "DatasetFormat.ValueType", columns: Sequence[Column]
) -> Iterator[list[list[Value]]]:
    """The values of a file, column by column, in batches of at most `BATCH_ROWS` rows.

    Raises `InvalidFieldError` for the first row that does not fit the columns.
    """
    _, rows = _rows(raw, data_format, [column.name for column in columns])
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == BATCH_ROWS:
            yield _parsed(batch, data_format, columns)
            batch = []
    if batch:
        yield _parsed(batch, data_format, columns)


def _parsed(
    rows: Sequence[Row], data_format: "DatasetFormat.ValueType", columns: Sequence[Column]
) -> list[list[Value]]:
    parsers = [parser(data_format, column.type) for column in columns]
    try:
        return [[parse(row.values[index]) for row in rows] for index, parse in enumerate(parsers)]
    except ValueError:
        for row in rows:
            for column, parse, value in zip(columns, parsers, row.values, strict=True):
                try:
                    parse(value)
                except ValueError:
                    raise _refused(row.line, mismatch(column.type, value), column.name) from None
        raise


def _rows(
    raw: Iterator[bytes], data_format: "DatasetFormat.ValueType", names: Sequence[str] | None
) -> tuple[Sequence[str], Iterator[Row]]:
    """The columns' names, which must be `names` if those are given, and the rows."""
    lines = _Lines(raw)
    read = _csv_rows if data_format == DatasetFormat.DATASET_FORMAT_CSV else _json_rows
    rows = read(lines, names)
    # The first thing both readers yield is the names, so that a wrong header is found before any row.
    header = next(rows)
    _check_names(header.line, header.values)
    return header.values, rows


class _Lines(Iterator[str]):
    """The physical lines of a file, decoded; counts them, and the bytes of the row they belong to."""

    def __init__(self, raw: Iterator[bytes]) -> None:
        self._raw = raw
        self._row_bytes = 0
        self._row_line = 1
        self.number = 0

    def __next__(self) -> str:
        raw = next(self._raw)
        self.number += 1
        self._row_bytes += len(raw)
        if self._row_bytes > MAX_LINE_BYTES:
            raise _refused(self._row_line, f"expected at most {MAX_LINE_BYTES:,} bytes, quoted line breaks included")
        try:
            text = raw.decode()
        except UnicodeDecodeError as error:
            raise _refused(
                self.number, f"expected UTF-8; got byte 0x{raw[error.start]:02x} at position {error.start + 1}"
            ) from error
        return text.removeprefix(_BYTE_ORDER_MARK) if self.number == 1 else text

    def begin_row(self) -> int:
        """Begins the count of a row's bytes anew and tells the number of its first line."""
        self._row_bytes = 0
        self._row_line = self.number + 1
        return self._row_line


def _csv_rows(lines: _Lines, expected: Sequence[str] | None) -> Iterator[Row]:
    reader = csv.reader(lines, strict=True)
    header = _csv_row(reader, lines)
    if header is None:
        raise _refused(1, "expected the columns' names; got an empty file")
    if expected is not None and list(header.values) != list(expected):
        raise _refused(header.line, f"expected the columns {_listed(expected)}; got {_listed(header.values)}")
    yield header
    while (row := _csv_row(reader, lines)) is not None:
        if len(row.values) != len(header.values):
            came = len(row.values) or "an empty line"
            raise _refused(row.line, f"expected {len(header.values)} values; got {came}")
        yield row


def _csv_row(reader: Iterator[list[str]], lines: _Lines) -> Row | None:
    line = lines.begin_row()
    try:
        values = next(reader, None)
    except csv.Error as error:
        raise _refused(line, f"expected comma-separated values (RFC 4180); {error}") from error
    return None if values is None else Row(line, values)


def _json_rows(lines: _Lines, expected: Sequence[str] | None) -> Iterator[Row]:
    names = expected
    line = lines.begin_row()
    for text in lines:
        values = _json_object(line, text)
        if names is None:
            names = list(values)
        if line == 1:
            yield Row(1, names)
        if len(values) > len(names) and (unknown := values.keys() - set(names)):
            raise _refused(line, f"expected no other keys than the columns; got {shown(min(unknown))}")
        try:
            yield Row(line, [values[name] for name in names])
        except KeyError as error:
            raise _refused(line, "expected a value; the key is missing", str(error.args[0])) from error
        line = lines.begin_row()
    if line == 1:
        raise _refused(1, "expected a JSON object; got an empty file")


def _json_object(line: int, text: str) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            (twice, _), *_ = Counter(key for key, _ in pairs).most_common(1)
            raise _refused(line, f"expected each key once; got {shown(twice)} twice")
        return values

    def no_constant(name: str) -> Any:  # noqa: ANN401  # the decoder's own signature
        raise _refused(line, f"expected JSON without {name}: numbers must be finite")

    try:
        value = json.loads(text, object_pairs_hook=unique, parse_constant=no_constant)
    except (ValueError, RecursionError) as error:
        reason = "an empty line" if not text.strip() else str(error)
        raise _refused(line, f"expected one JSON object; got {reason}") from error
    if not isinstance(value, dict):
        raise _refused(line, f"expected one JSON object; got {shown(value)}")
    return value


def _check_names(line: int, names: Sequence[str]) -> None:
    if len(names) > MAX_COLUMNS:
        raise _refused(line, f"expected at most {MAX_COLUMNS:,} columns; got {len(names):,}")
    seen: set[str] = set()
    for position, name in enumerate(names, 1):
        if problem := name_problem(name):
            raise _refused(line, f"the name of column {position}: {problem}")
        if name in seen:
            raise _refused(line, f"expected each column name once; got {shown(name)} twice")
        seen.add(name)
    if not names:
        raise _refused(line, "expected at least one column")


def name_problem(name: str) -> str:
    """What is wrong with a column's name; empty if nothing is."""
    if not 0 < len(name) <= MAX_COLUMN_NAME:
        return f"expected 1 to {MAX_COLUMN_NAME} characters; got {len(name)}"
    try:
        name.encode()
    except UnicodeEncodeError:
        return f"expected characters that UTF-8 can write; got {shown(name)}"
    return ""


def _listed(names: Sequence[str]) -> str:
    text = ", ".join(map(shown, names[:10]))
    return f"{text}, … ({len(names):,} in all)" if len(names) > 10 else text


def _refused(line: int, problem: str, column: str = "") -> InvalidFieldError:
    return InvalidFieldError.of(f"content.line[{line}]" + (f".{column}" if column else ""), problem)
