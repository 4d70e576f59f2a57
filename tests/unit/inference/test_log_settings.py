"""LogSettings changes what loggers in use write, at once; and no caller chooses a file."""

import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from penstock.inference.log_settings import LogSettings
from penstock.oip import inference_pb2 as pb
from penstock.rpc import logs
from penstock.rpc.errors import InvalidFieldError
from penstock.rpc.logs import LogFormat, LogLevel, configure_logging, debug_enabled

Setting = bool | int | str

ALL = {
    "log_file": "",
    "log_info": True,
    "log_warning": True,
    "log_error": True,
    "log_verbose_level": 0,
    "log_format": "default",
}


@pytest.fixture(autouse=True)
def _restored_logging() -> Iterator[None]:
    """Logging is the process's, and other tests want it as it was."""
    root = logging.getLogger()
    handlers, level, current = root.handlers, root.level, logs.current_logging()
    libraries = {name: logging.getLogger(name).level for name in ("aiosqlite", "alembic", "asyncio", "sqlalchemy")}
    yield
    root.handlers = handlers
    root.setLevel(level)
    for name, before in libraries.items():
        logging.getLogger(name).setLevel(before)
    logs.change_logging(current)
    logs._handler = None
    structlog.reset_defaults()
    structlog.contextvars.clear_contextvars()
    root.setLevel(level)


def request(**settings: Setting) -> pb.LogSettingsRequest:
    message = pb.LogSettingsRequest()
    for name, value in settings.items():
        if isinstance(value, bool):
            message.settings[name].bool_param = value
        elif isinstance(value, int):
            message.settings[name].uint32_param = value
        else:
            message.settings[name].string_param = value
    return message


def settings_of(response: pb.LogSettingsResponse) -> dict[str, Setting]:
    return {
        name: getattr(value, value.WhichOneof("parameter_choice") or "") for name, value in response.settings.items()
    }


def written(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The events that one record of each level leaves, by loggers that were in use before; libraries' too."""
    capsys.readouterr()
    log = structlog.get_logger("penstock.test")
    for level in ("debug", "info", "warning", "error"):
        getattr(log, level)(f"our {level}")
        getattr(logging.getLogger("some.library"), level)(f"their {level}")
    try:
        int("no number")
    except ValueError:
        log.exception("our exception")
    lines = capsys.readouterr().err.splitlines()
    return [json.loads(line)["event"] for line in lines]


@pytest.mark.parametrize(
    ("changes", "levels"),
    [
        ({}, ["info", "warning", "error"]),
        ({"log_verbose_level": 1}, ["debug", "info", "warning", "error"]),
        ({"log_info": False}, ["warning", "error"]),
        ({"log_warning": False}, ["info", "error"]),
        ({"log_error": False}, ["info", "warning"]),
        ({"log_info": False, "log_warning": False, "log_error": False}, []),
        ({"log_info": False, "log_warning": False, "log_error": False, "log_verbose_level": 7}, ["debug"]),
    ],
)
def test_each_level_is_switched_for_itself_and_back(
    changes: dict[str, Setting], levels: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging("json", "info", "test")
    settings = LogSettings()
    default = [f"{whose} {level}" for level in ("info", "warning", "error") for whose in ("our", "their")]
    assert written(capsys) == [*default, "our exception"]
    answer = settings_of(settings.update(request(**changes)))
    assert answer == ALL | {"log_format": "json"} | changes
    expected = [f"{whose} {level}" for level in levels for whose in ("our", "their")]
    assert written(capsys) == expected + (["our exception"] if "error" in levels else [])
    assert debug_enabled() == ("debug" in levels)
    settings.update(request(log_info=True, log_warning=True, log_error=True, log_verbose_level=0))
    assert written(capsys) == [*default, "our exception"]


@pytest.mark.parametrize(
    ("name", "is_json"), [("default", False), ("ISO8601", False), ("console", False), ("json", True)]
)
def test_the_format_changes_for_loggers_in_use(name: str, is_json: bool, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("console" if is_json else "json", "info", "test")
    log = structlog.get_logger("penstock.test").bind()
    log.info("before")
    settings = LogSettings()
    assert settings_of(settings.update(request(log_format=name))) == ALL | {"log_format": name}
    capsys.readouterr()
    log.info("after")
    line = capsys.readouterr().err
    assert "after" in line
    assert line.startswith("{") == is_json


@pytest.mark.parametrize(
    ("log_format", "level", "expected"),
    [
        ("console", "debug", {"log_verbose_level": 1}),
        ("json", "warning", {"log_info": False, "log_format": "json"}),
        ("console", "error", {"log_info": False, "log_warning": False}),
    ],
)
def test_an_empty_request_tells_how_the_server_was_started(
    log_format: LogFormat, level: LogLevel, expected: dict[str, Setting]
) -> None:
    configure_logging(log_format, level, "test")
    assert settings_of(LogSettings().update(request())) == ALL | expected


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"log_file": "/etc/passwd"}, "cannot be changed"),
        ({"log_warnings": True}, "there are log_file, log_info"),
        ({"log_info": "false"}, "expected bool_param; got string_param"),
        ({"log_verbose_level": True}, "expected uint32_param; got bool_param"),
        ({"log_format": "xml"}, "expected one of default, ISO8601, console, json; got 'xml'"),
    ],
)
def test_a_wrong_setting_changes_nothing(wrong: dict[str, Setting], text: str) -> None:
    configure_logging("console", "info", "test")
    settings = LogSettings()
    with pytest.raises(InvalidFieldError) as refused:
        settings.update(request(**wrong) if "log_info" in wrong else request(log_info=False, **wrong))
    assert text in refused.value.message
    assert settings_of(settings.update(request())) == ALL


def test_a_setting_without_a_value_is_refused() -> None:
    message = pb.LogSettingsRequest()
    message.settings["log_info"].SetInParent()
    with pytest.raises(InvalidFieldError, match="got no value"):
        LogSettings().update(message)


def test_who_silences_the_log_leaves_a_trace(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json", "info", "test")
    LogSettings().update(request(log_info=False, log_warning=False, log_error=False))
    assert "log settings changed" in capsys.readouterr().err
