"""What is a row, what is not, and which types a file suggests."""

import csv
import io
import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.api.dataset.v1.dataset_pb2 import Column, ColumnType, DatasetFormat
from penstock.rpc.errors import InvalidFieldError
from penstock.training.datasets.parse import MAX_LINE_BYTES, read_batches, read_schema

CSV = DatasetFormat.DATASET_FORMAT_CSV
JSON_LINES = DatasetFormat.DATASET_FORMAT_JSON_LINES
INT64, FLOAT64, STRING = (
    ColumnType.COLUMN_TYPE_INT64,
    ColumnType.COLUMN_TYPE_FLOAT64,
    ColumnType.COLUMN_TYPE_STRING,
)
SCHEMA = [Column(name="i", type=INT64), Column(name="f", type=FLOAT64), Column(name="s", type=STRING)]


def lines(content: bytes) -> Iterator[bytes]:
    file = io.BytesIO(content)
    return iter(lambda: file.readline(MAX_LINE_BYTES + 1), b"")


def parsed(
    data_format: int, content: bytes, schema: list[Column] | None = None
) -> tuple[dict[str, int], list[tuple[Any, ...]]]:
    """The types and the rows of some bytes."""
    schema = schema or read_schema(lines(content), data_format)
    batches = list(read_batches(lines(content), data_format, schema))
    rows = [row for batch in batches for row in zip(*batch, strict=True)]
    return {column.name: column.type for column in schema}, rows


BAD = {
    "letters for a whole number": (CSV, b"i,f,s\n1,1,a\nx,1,a\n", "content.line[3].i", "'x'"),
    "a fraction for a whole number": (CSV, b"i,f,s\n1.5,1,a\n", "content.line[2].i", "'1.5'"),
    "a whole number out of range": (CSV, b"i,f,s\n9223372036854775808,1,a\n", "content.line[2].i", "2⁶³"),
    "a whole number of 5,000 digits": (CSV, b"i,f,s\n" + b"9" * 5000 + b",1,a\n", "content.line[2].i", "'999"),
    "underscores in a number": (CSV, b"i,f,s\n1_000,1,a\n", "content.line[2].i", "'1_000'"),
    "a blank before a number": (CSV, b"i,f,s\n 1,1,a\n", "content.line[2].i", "' 1'"),
    "Arabic digits": (CSV, "i,f,s\n٣,1,a\n".encode(), "content.line[2].i", "'٣'"),
    "NaN": (CSV, b"i,f,s\n1,NaN,a\n", "content.line[2].f", "'NaN'"),
    "infinity": (CSV, b"i,f,s\n1,-inf,a\n", "content.line[2].f", "'-inf'"),
    "a number beyond the largest": (CSV, b"i,f,s\n1,1e400,a\n", "content.line[2].f", "'1e400'"),
    "a missing number": (CSV, b"i,f,s\n1,,a\n", "content.line[2].f", "got nothing"),
    "too few values": (CSV, b"i,f,s\n1,2,a\n1,2\n", "content.line[3]", "expected 3 values; got 2"),
    "too many values": (CSV, b"i,f,s\n1,2,a,b\n", "content.line[2]", "expected 3 values; got 4"),
    "an empty line": (CSV, b"i,f,s\n1,2,a\n\n1,2,b\n", "content.line[3]", "an empty line"),
    "another header": (CSV, b"i,g,s\n1,2,a\n", "content.line[1]", "expected the columns 'i', 'f', 's'; got 'i', 'g'"),
    "no header": (CSV, b"", "content.line[1]", "an empty file"),
    "no UTF-8": (CSV, b"i,f,s\n1,2,a\n1,2,\xff\n", "content.line[3]", "byte 0xff at position 5"),
    "a quote that never ends": (CSV, b'i,f,s\n1,2,a\n1,2,"b\n1,2,c\n', "content.line[3]", "RFC 4180"),
    "letters after a quote": (CSV, b'i,f,s\n1,2,"a"b\n', "content.line[2]", "RFC 4180"),
    "old line ends": (CSV, b"i,f,s\r1,2,a\r", "content.line[1]", "RFC 4180"),
    "a line too long": (CSV, b"i,f,s\n1,2,a\n1,2," + b"x" * 65536 + b"\n", "content.line[3]", "65,536 bytes"),
    "a row of many short lines": (
        CSV,
        b'i,f,s\n1,2,"' + b"x\n" * 40000 + b'"\n',
        "content.line[2]",
        "65,536 bytes",
    ),
    "a line after a quoted line break": (CSV, b'i,f,s\n1,2,"a\nb"\nx,2,c\n', "content.line[4].i", "'x'"),
    "text for a number": (JSON_LINES, b'{"i": "1", "f": 1, "s": ""}', "content.line[1].i", "'1'"),
    "a fraction in JSON": (JSON_LINES, b'{"i": 1.0, "f": 1, "s": ""}', "content.line[1].i", "1.0"),
    "true for a number": (JSON_LINES, b'{"i": 1, "f": true, "s": ""}', "content.line[1].f", "true"),
    "null": (JSON_LINES, b'{"i": 1, "f": 1, "s": null}', "content.line[1].s", "null"),
    "a list": (JSON_LINES, b'{"i": 1, "f": 1, "s": []}', "content.line[1].s", "[]"),
    "half a character": (JSON_LINES, b'{"i": 1, "f": 1, "s": "\\ud800"}', "content.line[1].s", "ud800"),
    "NaN in JSON": (JSON_LINES, b'{"i": 1, "f": NaN, "s": ""}', "content.line[1]", "NaN"),
    "an infinite number in JSON": (JSON_LINES, b'{"i": 1, "f": 1e999, "s": ""}', "content.line[1].f", "finite"),
    "a missing key": (JSON_LINES, b'{"i": 1, "f": 1, "s": ""}\n{"i": 1, "s": ""}', "content.line[2].f", "missing"),
    "another key": (JSON_LINES, b'{"i": 1, "f": 1, "s": "", "t": 1}', "content.line[1]", "'t'"),
    "a key twice": (JSON_LINES, b'{"i": 1, "i": 2, "f": 1, "s": ""}', "content.line[1]", "'i' twice"),
    "no object": (JSON_LINES, b'{"i": 1, "f": 1, "s": ""}\n[1]', "content.line[2]", "one JSON object; got [1]"),
    "broken JSON": (JSON_LINES, b'{"i": 1, "f": 1, "s": ""}\n{"i": ', "content.line[2]", "one JSON object"),
    "nothing but brackets": (JSON_LINES, b"[" * 60000, "content.line[1]", "one JSON object"),
    "an empty line of JSON": (JSON_LINES, b'{"i": 1, "f": 1, "s": ""}\n\n', "content.line[2]", "an empty line"),
}


@pytest.mark.parametrize(("data_format", "content", "field", "part"), BAD.values(), ids=BAD)
def test_a_bad_row_is_refused_by_its_line_and_column(data_format: int, content: bytes, field: str, part: str) -> None:
    with pytest.raises(InvalidFieldError) as refused:
        parsed(data_format, content, SCHEMA)

    (violation,) = refused.value.violations
    assert violation.field == field
    assert part in violation.description
    assert len(violation.description) < 300


BAD_NAMES = {
    "a column twice": (b"a,b,a\n1,2,3\n", "'a' twice"),
    "a column without a name": (b"a,,b\n1,2,3\n", "column 2: expected 1 to 200 characters; got 0"),
    "a long name": (b"a," + b"x" * 201 + b"\n1,2\n", "got 201"),
    "too many columns": (",".join(f"c{n}" for n in range(10_001)).encode(), "at most 10,000 columns; got 10,001"),
}


@pytest.mark.parametrize(("content", "part"), BAD_NAMES.values(), ids=BAD_NAMES)
def test_bad_column_names_are_refused(content: bytes, part: str) -> None:
    with pytest.raises(InvalidFieldError, match=part):
        parsed(CSV, content)


def test_the_first_bad_row_of_a_batch_is_told_whatever_its_column() -> None:
    with pytest.raises(InvalidFieldError) as refused:
        parsed(CSV, b"i,f,s\n1,x,a\ny,1,a\n", SCHEMA)
    assert refused.value.violations[0].field == "content.line[2].f"


SUGGESTED = {
    "whole numbers": (CSV, b"c\n1\n-2\n", INT64),
    "one fraction": (CSV, b"c\n1\n2.5\n3\n", FLOAT64),
    "whole numbers too large": (CSV, b"c\n1\n9223372036854775808\n", FLOAT64),
    "one word": (CSV, b"c\n1\n2.5\nx\n", STRING),
    "not one row": (CSV, b"c\n", STRING),
    "words and an empty one": (CSV, b'c\nx\n""\nnan\n', STRING),
    "JSON numbers": (JSON_LINES, b'{"c": 1}\n{"c": 2.0}', FLOAT64),
    "JSON whole numbers": (JSON_LINES, b'{"c": 1}\n{"c": 2}', INT64),
    "JSON digits in quotes": (JSON_LINES, b'{"c": "1"}', STRING),
}


@pytest.mark.parametrize(("data_format", "content", "expected"), SUGGESTED.values(), ids=SUGGESTED)
def test_a_column_has_the_narrowest_type(data_format: int, content: bytes, expected: int) -> None:
    assert parsed(data_format, content)[0] == {"c": expected}


@pytest.mark.parametrize("missing", [b'""', b"nan", b"NULL", b"-Infinity"])
def test_a_missing_value_does_not_make_text_of_numbers(missing: bytes) -> None:
    with pytest.raises(InvalidFieldError) as refused:
        parsed(CSV, b"c\n1\n2.5\n" + missing + b"\n4\n")
    assert refused.value.violations[0].field == "content.line[4].c"


def test_json_numbers_and_text_do_not_mix() -> None:
    with pytest.raises(InvalidFieldError) as refused:
        parsed(JSON_LINES, b'{"c": 1}\n{"c": "x"}')
    assert refused.value.violations[0].field == "content.line[2].c"


def test_windows_line_ends_and_a_byte_order_mark_are_no_part_of_a_value() -> None:
    assert parsed(CSV, b"\xef\xbb\xbfa,b\r\n1,x\r\n2,y")[1] == [(1, "x"), (2, "y")]


texts = st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=20)
finite = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(-(2**63), 2**63 - 1)


@given(st.lists(st.tuples(integers, finite, texts), min_size=1, max_size=30))
def test_csv_comes_back_as_it_was(rows: list[tuple[int, float, str]]) -> None:
    file = io.StringIO(newline="")
    writer = csv.writer(file)
    writer.writerows([("i", "f", "s"), *rows])

    assert parsed(CSV, file.getvalue().encode(), SCHEMA)[1] == rows


@given(st.lists(st.tuples(integers, finite, texts), min_size=1, max_size=30))
def test_json_lines_come_back_as_they_were(rows: list[tuple[int, float, str]]) -> None:
    content = "\n".join(json.dumps(dict(zip("ifs", row, strict=True))) for row in rows).encode()

    back = parsed(JSON_LINES, content, SCHEMA)[1]

    assert back == rows
    assert all(math.copysign(1, one[1]) == math.copysign(1, other[1]) for one, other in zip(back, rows, strict=True))


@given(st.binary(max_size=200), st.sampled_from([CSV, JSON_LINES]))
def test_any_bytes_are_rows_or_a_clear_refusal(content: bytes, data_format: int) -> None:
    fields = ["content.line["]
    try:
        types, rows = parsed(data_format, content)
        assert all(len(row) == len(types) for row in rows)
    except InvalidFieldError as refused:
        fields = [violation.field for violation in refused.violations]
    assert all(field.startswith("content.line[") for field in fields)
