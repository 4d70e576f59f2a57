"""The RPC LogSettings: what the server logs, changed while it runs (Triton's extension)."""

from collections.abc import Mapping
from dataclasses import replace

import structlog

from penstock.oip import inference_pb2 as pb
from penstock.rpc.errors import InvalidFieldError, Violation
from penstock.rpc.logs import LogFormat, Logging, change_logging, current_logging

FILE = "log_file"
INFO = "log_info"
WARNING = "log_warning"
ERROR = "log_error"
VERBOSE_LEVEL = "log_verbose_level"
FORMAT = "log_format"

# Triton's two formats differ in how they write the time. Ours always writes it as ISO 8601.
FORMATS: dict[str, LogFormat] = {"default": "console", "ISO8601": "console", "console": "console", "json": "json"}

_CHOICES = {
    FILE: "string_param",
    INFO: "bool_param",
    WARNING: "bool_param",
    ERROR: "bool_param",
    VERBOSE_LEVEL: "uint32_param",
    FORMAT: "string_param",
}

_Value = pb.LogSettingsRequest.SettingValue

_log = structlog.get_logger("penstock.inference.log_settings")


class LogSettings:
    """Translates between the RPC's settings and `penstock.rpc.logs`."""

    def __init__(self) -> None:
        # As a caller gave them, because it compares what it is told with that: any verbose level from 1 on is `debug`,
        # and three names are one format.
        self._verbose_level = 1
        self._format_name = "default"

    def update(self, request: pb.LogSettingsRequest) -> pb.LogSettingsResponse:
        """Changes what the request names, and nothing if any of it is wrong; answers everything as it is then.

        Raises `InvalidFieldError` for an unknown setting, a value of the wrong type, or another file: no caller
        chooses where this server writes.
        """
        settings = request.settings
        violations = [
            Violation(f"settings[{name[:80]}]", problem)
            for name in sorted(settings)
            if (problem := _problem(name, settings[name]))
        ]
        if violations:
            raise InvalidFieldError(violations)
        before = current_logging()
        wanted = self._wanted(settings, before)
        if wanted != before:
            # Before the change, so that whoever silences the log leaves a trace in it.
            log = _log.warning if before.warning else _log.error
            log("log settings changed", before=str(before), after=str(wanted))
            change_logging(wanted)
        return self._response(wanted)

    def _wanted(self, settings: Mapping[str, _Value], before: Logging) -> Logging:
        levels = {
            field: settings[name].bool_param
            for name, field in ((INFO, "info"), (WARNING, "warning"), (ERROR, "error"))
            if name in settings
        }
        if VERBOSE_LEVEL in settings:
            self._verbose_level = settings[VERBOSE_LEVEL].uint32_param
            levels["debug"] = self._verbose_level > 0
        log_format = before.format
        if FORMAT in settings:
            self._format_name = settings[FORMAT].string_param
            log_format = FORMATS[self._format_name]
        return replace(before, format=log_format, **levels)

    def _response(self, now: Logging) -> pb.LogSettingsResponse:
        response = pb.LogSettingsResponse()
        response.settings[FILE].string_param = ""
        response.settings[INFO].bool_param = now.info
        response.settings[WARNING].bool_param = now.warning
        response.settings[ERROR].bool_param = now.error
        response.settings[VERBOSE_LEVEL].uint32_param = max(1, self._verbose_level) if now.debug else 0
        same = FORMATS[self._format_name] == now.format
        response.settings[FORMAT].string_param = self._format_name if same else now.format
        return response


def _problem(name: str, value: _Value) -> str:
    """What is wrong with a setting; "" if nothing is."""
    expected = _CHOICES.get(name)
    if expected is None:
        return f"there is no such setting; there are {', '.join(_CHOICES)}"
    if (came := value.WhichOneof("parameter_choice")) != expected:
        return f"expected {expected}; got {came or 'no value'}"
    if name == FILE and value.string_param:
        return "it cannot be changed: the log goes to standard error, and only the operator sends it elsewhere"
    if name == FORMAT and value.string_param not in FORMATS:
        return f"expected one of {', '.join(FORMATS)}; got {value.string_param[:80]!r}"
    return ""
