"""Our own dataclasses and errors as JSON and back, to cross from one process to another."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from penstock.converters import errors
from penstock.converters.errors import ConversionError


def encode(value: Any) -> Any:  # noqa: ANN401 JSON is anything
    """Dataclasses, sequences, mappings with names and paths as JSON's own types."""
    if is_dataclass(value):
        return {item.name: encode(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, Mapping):
        return {key: encode(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [encode(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def decode(kind: Any, value: Any) -> Any:  # noqa: ANN401 a type, as hints give it, and JSON
    """The value of this type that `encode` has encoded. Raises `TypeError` on anything else."""
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        return kind(**{name: decode(hints[name], item) for name, item in value.items()})
    if decode_parts := _BY_ORIGIN.get(get_origin(kind)):
        return decode_parts(get_args(kind), value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is Any or isinstance(value, int | float if kind is float else kind):
        return value
    raise TypeError(f"expected a value of the type {kind}, got {value!r}")


def encode_error(error: Exception) -> dict[str, Any]:
    return {"class": type(error).__name__, "text": str(error), "fields": encode(vars(error))}


def decode_error(encoded: Mapping[str, Any]) -> ConversionError:
    """The error of the same class, text and fields. Its constructor does not run: it would make another text."""
    kind = getattr(errors, encoded["class"])
    if not issubclass(kind, ConversionError):
        raise TypeError(f"expected an error of a conversion, got {kind}")
    error: ConversionError = kind.__new__(kind, encoded["text"])
    vars(error).update(encoded["fields"])
    return error


def _one_of(kinds: tuple[Any, ...], value: Any) -> Any:  # noqa: ANN401 types, as hints give them, and JSON
    """Members of a union are told apart by JSON's types; no union of ours has two that look the same in it."""
    for kind in kinds:
        with suppress(TypeError, AttributeError):
            return decode(kind, value)
    raise TypeError(f"expected a value of one of the types {kinds}, got {value!r}")


def _tuple(kinds: tuple[Any, ...], value: list[Any]) -> tuple[Any, ...]:
    if kinds[1:] == (Ellipsis,):
        return tuple(decode(kinds[0], item) for item in value)
    return tuple(decode(kind, item) for kind, item in zip(kinds, value, strict=True))


def _dict(kinds: tuple[Any, ...], value: dict[str, Any]) -> dict[str, Any]:
    return {key: decode(kinds[1], item) for key, item in value.items()}


def _literal(known: tuple[Any, ...], value: Any) -> Any:  # noqa: ANN401 the values of a type, and JSON
    if value not in known:
        raise TypeError(f"expected one of {known}, got {value!r}")
    return value


_BY_ORIGIN: dict[Any, Callable[[tuple[Any, ...], Any], Any]] = {
    Union: _one_of,
    UnionType: _one_of,
    tuple: _tuple,
    dict: _dict,
    Mapping: _dict,
    Sequence: lambda kinds, value: tuple(decode(kinds[0], item) for item in value),
    Literal: _literal,
}
