"""What a value of each format and column type looks like, and which type a value suggests for its column."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

from penstock.api.dataset.v1.dataset_pb2 import ColumnType, DatasetFormat

Value = int | float | str

_INTEGER = re.compile(r"[+-]?[0-9]+")
# No two parts can share the same digits: on a long line of them the search would take minutes.
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
# How other tools write that a number is missing or not finite. Such a value does not make text of a column of numbers.
_NOT_A_NUMBER = re.compile(r"\s*|[+-]?(?:nan|inf|infinity)|na|n/a|null|none", re.IGNORECASE)

_EXPECTED = {
    ColumnType.COLUMN_TYPE_INT64: "a whole number from −2⁶³ to 2⁶³ − 1",
    ColumnType.COLUMN_TYPE_FLOAT64: "a finite number",
    ColumnType.COLUMN_TYPE_STRING: "text",
}


def parser(data_format: "DatasetFormat.ValueType", column_type: "ColumnType.ValueType") -> Callable[[Any], Value]:
    """The function from a value as it was read to the value as it is kept. It raises `ValueError`."""
    return _PARSERS[data_format, column_type]


def suggested_type(data_format: "DatasetFormat.ValueType", value: object) -> "ColumnType.ValueType":
    """The narrowest type of one value; unspecified if the value says nothing about its column."""
    if data_format == DatasetFormat.DATASET_FORMAT_CSV:
        return _type_of_text(str(value))
    return _type_of_json(value)


def merged_type(
    data_format: "DatasetFormat.ValueType", before: "ColumnType.ValueType", value_type: "ColumnType.ValueType"
) -> "ColumnType.ValueType":
    """The narrowest type for a column that was `before` so far and has a value of `value_type`.

    JSON tells numbers from text itself, so there one never becomes the other: such a row is then refused.
    """
    text = ColumnType.COLUMN_TYPE_STRING
    if data_format == DatasetFormat.DATASET_FORMAT_JSON_LINES and before and text in (before, value_type):
        return before
    return max(before, value_type)


def mismatch(column_type: "ColumnType.ValueType", value: object) -> str:
    """What was expected and what came, for people."""
    return f"expected {_EXPECTED[column_type]}; got {shown(value)}"


def shown(value: object) -> str:
    """A value as it may stand in an error: short."""
    if value == "":
        return "nothing"
    text = repr(value) if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}…"


def _text_to_integer(text: str) -> int:
    if not _INTEGER.fullmatch(text):
        raise ValueError(text)
    return _in_range(int(text))


def _text_to_float(text: str) -> float:
    if not _DECIMAL.fullmatch(text):
        raise ValueError(text)
    return _finite(float(text))


def _json_to_integer(value: object) -> int:
    if type(value) is not int:
        raise ValueError(value)
    return _in_range(value)


def _json_to_float(value: object) -> float:
    if type(value) is int:
        try:
            return float(value)
        except OverflowError as error:
            raise ValueError(value) from error
    if type(value) is not float:
        raise ValueError(value)
    return _finite(value)


def _json_to_text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(value)  # noqa: TRY004  # one exception for every value that does not fit
    value.encode()
    return value


def _in_range(value: int) -> int:
    if not -(2**63) <= value < 2**63:
        raise ValueError(value)
    return value


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError(value)
    return value


def _type_of_text(text: str) -> "ColumnType.ValueType":
    if _INTEGER.fullmatch(text) and len(text) <= 20 and -(2**63) <= int(text) < 2**63:
        return ColumnType.COLUMN_TYPE_INT64
    if _DECIMAL.fullmatch(text):
        return ColumnType.COLUMN_TYPE_FLOAT64
    if _NOT_A_NUMBER.fullmatch(text):
        return ColumnType.COLUMN_TYPE_UNSPECIFIED
    return ColumnType.COLUMN_TYPE_STRING


def _type_of_json(value: object) -> "ColumnType.ValueType":
    if type(value) is int:
        return ColumnType.COLUMN_TYPE_INT64 if -(2**63) <= value < 2**63 else ColumnType.COLUMN_TYPE_FLOAT64
    if type(value) is float:
        return ColumnType.COLUMN_TYPE_FLOAT64
    if isinstance(value, str):
        return ColumnType.COLUMN_TYPE_STRING
    return ColumnType.COLUMN_TYPE_UNSPECIFIED


_PARSERS: dict[tuple[int, int], Callable[[Any], Value]] = {
    (DatasetFormat.DATASET_FORMAT_CSV, ColumnType.COLUMN_TYPE_INT64): _text_to_integer,
    (DatasetFormat.DATASET_FORMAT_CSV, ColumnType.COLUMN_TYPE_FLOAT64): _text_to_float,
    (DatasetFormat.DATASET_FORMAT_CSV, ColumnType.COLUMN_TYPE_STRING): str,
    (DatasetFormat.DATASET_FORMAT_JSON_LINES, ColumnType.COLUMN_TYPE_INT64): _json_to_integer,
    (DatasetFormat.DATASET_FORMAT_JSON_LINES, ColumnType.COLUMN_TYPE_FLOAT64): _json_to_float,
    (DatasetFormat.DATASET_FORMAT_JSON_LINES, ColumnType.COLUMN_TYPE_STRING): _json_to_text,
}
