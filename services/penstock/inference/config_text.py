"""A model's configuration as people write it: config.pbtxt, or JSON in a request."""

import re
from collections.abc import Iterator, Sequence

import structlog
from google.protobuf import json_format, text_format

from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import WrongStateError

# What protobuf's parser says of a field that the message does not have; it points at the field's name.
_UNKNOWN_IN_TEXT = re.compile(r'has no field named "(\w+)"\.$')

_TOKEN = re.compile(r"""#[^\n]*|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'|[{}\[\]<>:;,]|[^\s{}\[\]<>:;,"'#]+|\s+|.""")
_CLOSING = {"{": "}", "[": "]", "<": ">"}
_QUOTES = ("'", '"')
# The empty one stands for the text's end, a quote alone for a string without one.
_NO_VALUES = ("", ":", ",", ";", *_CLOSING.values(), *_QUOTES)

# Every unknown field is another pass over the text, and a registry's configurations come from anybody.
_MAX_TEXT = 2**20
_MAX_UNKNOWN = 100

_log = structlog.get_logger("penstock.inference.config_text")


def parse_config(text: str, where: str) -> ModelConfig:
    """The configuration in a config.pbtxt. Fields that it does not know are named in a warning, and ignored.

    Raises `WrongStateError` with line and column for text that is no configuration. `where` names it in both.
    """
    config, unknown = parse_known(text, where)
    warn_of_unknown(unknown, where)
    return config


def warn_of_unknown(fields: Sequence[str], where: str) -> None:
    """Says in the log which fields are ignored, if there are any."""
    if fields:
        _log.warning("unknown fields of a model configuration are ignored", file=where, fields=list(fields))


def parse_known(text: str, where: str) -> tuple[ModelConfig, Sequence[str]]:
    """As `parse_config`, but returns the unknown fields, each with its line, for those who look again and again."""
    if len(text) > _MAX_TEXT:
        raise WrongStateError(f"{where} is no model configuration: expected {_MAX_TEXT} characters at most.")
    unknown: list[str] = []
    while True:
        try:
            config = text_format.Parse(text, ModelConfig())
            break
        except RecursionError:
            # Without its hundreds of frames.
            raise WrongStateError(f"{where} is no model configuration: it is nested too deeply.") from None
        except text_format.ParseError as error:
            match = _UNKNOWN_IN_TEXT.search(str(error))
            cleared = None
            if match is not None and len(unknown) < _MAX_UNKNOWN:
                cleared = _without_field(text, error.GetLine() or 1, error.GetColumn() or 1, match[1])
            if match is None or cleared is None:
                raise WrongStateError(f"{where} is no model configuration: {str(error)[:300]}.") from error
            unknown.append(f"{match[1]} (line {error.GetLine()})")
            text = cleared
    return config, unknown


def parse_config_json(text: str, where: str) -> ModelConfig:
    """The configuration in JSON. Raises `WrongStateError` for text that is none."""
    if len(text) > _MAX_TEXT:
        raise WrongStateError(f"{where} is no model configuration: expected {_MAX_TEXT} characters at most.")
    if not text.lstrip().startswith("{"):
        # The parser takes an empty list for a message.
        raise WrongStateError(f"{where} is no model configuration: expected a JSON object.")
    try:
        return json_format.Parse(text, ModelConfig())
    except (json_format.ParseError, RecursionError) as strict:
        try:
            config = json_format.Parse(text, ModelConfig(), ignore_unknown_fields=True)
        except json_format.ParseError as error:
            raise WrongStateError(f"{where} is no model configuration: {str(error)[:300]}.") from error
        except RecursionError:
            raise WrongStateError(f"{where} is no model configuration: it is nested too deeply.") from None
        _log.warning("unknown fields of a model configuration are ignored", file=where, error=str(strict)[:300])
        return config


def _without_field(text: str, line: int, column: int, name: str) -> str | None:
    """The text with one field blanked out, so that all others stay where they are; None if the field has no end."""
    start = sum(len(before) + 1 for before in text.split("\n")[: line - 1]) + column - 1
    if not text.startswith(name, start):
        return None
    end = _end_of_field(text, start + len(name))
    if end is None:
        return None
    return text[:start] + re.sub(r"[^\n]", " ", text[start:end]) + text[end:]


def _end_of_field(text: str, start: int) -> int | None:
    """Where a field ends whose name ends at `start`: behind its value and a separator. None: it has no proper value."""
    words = _words(text, start)
    word, end = next(words)
    for prefix in (":", "-"):
        if word == prefix:
            word, end = next(words)
    if word in _NO_VALUES:
        return None
    if word in _CLOSING:
        behind = _end_of_brackets(word, words)
        if behind is None:
            return None
        end = behind
    for after, after_end in words:
        # Strings in a row are one string.
        if word[0] not in _QUOTES or after[:1] not in _QUOTES or after in _NO_VALUES:
            return after_end if after in (",", ";") else end
        end = after_end
    return end


def _end_of_brackets(bracket: str, words: Iterator[tuple[str, int]]) -> int | None:
    """Where the bracket is closed that has just been opened. None: it is not, or by another one."""
    expected = [_CLOSING[bracket]]
    for word, end in words:
        if word in _CLOSING:
            expected.append(_CLOSING[word])
        elif word in _QUOTES or (word in _CLOSING.values() and word != expected.pop()):
            return None
        if not expected:
            return end
    return None


def _words(text: str, start: int) -> Iterator[tuple[str, int]]:
    """The words of a text from a place on, each with its end; then the empty one."""
    for match in _TOKEN.finditer(text, start):
        if not match[0].isspace() and match[0][0] != "#":
            yield match[0], match.end()
    yield "", len(text)
