"""A model's configuration as people write it: config.pbtxt, or JSON in a request."""

import re

import structlog
from google.protobuf import json_format, text_format

from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import WrongStateError

# What protobuf's parsers say of a field that the message does not have.
_UNKNOWN_IN_TEXT = re.compile(r'^(\d+):(\d+) : .*has no field named "(?P<field>\w+)"')

_TOKEN = re.compile(r"""#[^\n]*|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[{}\[\]<>:;,]|[^\s{}\[\]<>:;,"'#]+|\s+|.""")
_OPENING, _CLOSING, _QUOTES = ("{", "[", "<"), ("}", "]", ">"), ("'", '"')

_log = structlog.get_logger("penstock.inference.config_text")


def parse_config(text: str, where: str) -> ModelConfig:
    """The configuration in a config.pbtxt. Fields that it does not know are named in a warning, and ignored.

    Raises `WrongStateError` with line and column for text that is no configuration. `where` names it in both.
    """
    unknown, cleared = [], text
    while True:
        try:
            config = text_format.Parse(cleared, ModelConfig())
            break
        except text_format.ParseError as error:
            match = _UNKNOWN_IN_TEXT.search(str(error))
            if match is None:
                raise WrongStateError(f"{where} is no model configuration: {error}.") from error
            line, column = int(match[1]), int(match[2])
            unknown.append(f"{match['field']} (line {line})")
            cleared = _without_field(cleared, line, column, match["field"])
    if unknown:
        _log.warning("unknown fields of a model configuration are ignored", file=where, fields=unknown)
    return config


def parse_config_json(text: str, where: str) -> ModelConfig:
    """The configuration in JSON. Raises `WrongStateError` for text that is none."""
    try:
        return json_format.Parse(text, ModelConfig())
    except json_format.ParseError as strict:
        try:
            config = json_format.Parse(text, ModelConfig(), ignore_unknown_fields=True)
        except json_format.ParseError as error:
            raise WrongStateError(f"{where} is no model configuration: {str(error)[:300]}.") from error
        _log.warning("unknown fields of a model configuration are ignored", file=where, error=str(strict)[:300])
        return config


def _without_field(text: str, line: int, column: int, name: str) -> str:
    """The text with one field blanked out, so that all others stay where they are."""
    lines = text.splitlines(keepends=True)
    # The parser points at the end of a name or behind it; the name itself stands on the same line.
    offset = sum(map(len, lines[: line - 1]))
    start = text.rfind(name, offset, offset + max(column, 1) + len(name))
    start = start if start >= 0 else text.index(name, offset)
    end = _end_of_value(text, start + len(name))
    blank = re.sub(r"[^\n]", " ", text[start:end])
    return text[:start] + blank + text[end:]


def _end_of_value(text: str, start: int) -> int:
    """Where the value ends that follows a field's name: behind its closing bracket, or behind a scalar."""
    depth, end, last = 0, start, ""
    for match in _TOKEN.finditer(text, start):
        token = match[0]
        if token.isspace() or token[0] in "#:":
            continue
        # Strings in a row are one string.
        goes_on = not last or (token[0] in _QUOTES and last[0] in _QUOTES)
        if depth == 0 and (token in _CLOSING or not goes_on):
            break
        depth += (token in _OPENING) - (token in _CLOSING)
        end, last = match.end(), token
        if depth == 0 and token in _CLOSING:
            break
    return end
