"""Structured logs: one event a line, with fields, on standard error. What is logged can be changed at run time."""

import logging
import sys
from dataclasses import dataclass
from typing import Literal

import structlog

LogFormat = Literal["console", "json"]
LogLevel = Literal["debug", "info", "warning", "error"]

_METHODS = ("debug", "info", "warning", "error", "exception")
_EVERYTHING = structlog.make_filtering_bound_logger("debug")
_NOTHING = structlog.make_filtering_bound_logger("critical")
# The one class of all loggers, also of those that structlog has cached. A level is switched by exchanging its methods:
# the methods of a disabled level then do nothing at all, as if the level had been fixed at start-up.
_Logger = type("_Logger", (_EVERYTHING,), {})
# Likewise the one list of processors.
_processors: list[structlog.typing.Processor] = []


@dataclass(frozen=True)
class Logging:
    """What is logged, and how. Each level for itself: errors can be off while warnings are on."""

    format: LogFormat
    debug: bool
    info: bool
    warning: bool
    error: bool

    @classmethod
    def of(cls, log_format: LogFormat, level: LogLevel) -> "Logging":
        """A level and all above it."""
        threshold = logging.getLevelNamesMapping()[level.upper()]
        return cls(
            log_format,
            debug=threshold <= logging.DEBUG,
            info=threshold <= logging.INFO,
            warning=threshold <= logging.WARNING,
            error=True,
        )

    def logs(self, level: int) -> bool:
        """Whether records of this level, one of the numbers of `logging`, are written. Critical ones always are."""
        if level >= logging.CRITICAL:
            return True
        if level >= logging.ERROR:
            return self.error
        if level >= logging.WARNING:
            return self.warning
        return self.info if level >= logging.INFO else self.debug


_current = Logging.of("console", "info")
_handler: logging.Handler | None = None
_service = ""


def current_logging() -> Logging:
    return _current


def debug_enabled() -> bool:
    """For hot paths, where already gathering what would be logged costs too much."""
    return _current.debug


def configure_logging(log_format: LogFormat, level: LogLevel, service: str) -> None:
    """Sets the process's logging up; the records of libraries that use `logging` come out the same way."""
    global _handler, _service  # noqa: PLW0603  # logging is the process's
    _service = service
    structlog.configure(
        processors=_processors,
        wrapper_class=_Logger,
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    _handler = logging.StreamHandler(sys.stderr)
    _handler.addFilter(lambda record: _current.logs(record.levelno))
    logging.getLogger().handlers = [_handler]
    # A library's own progress is noise beside ours; its warnings are not.
    for library in ("aiosqlite", "alembic", "asyncio", "sqlalchemy"):
        logging.getLogger(library).setLevel(logging.WARNING)
    change_logging(Logging.of(log_format, level))


def change_logging(wanted: Logging) -> None:
    """Takes effect at once, also for loggers in use. Before `configure_logging` it is only remembered."""
    global _current  # noqa: PLW0603  # logging is the process's
    _current = wanted
    if _handler is None:
        return

    def add_service(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        # Not a context variable: calls that another thread brings in start with an empty context.
        event.setdefault("service", _service)
        return event

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        add_service,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.dict_tracebacks if wanted.format == "json" else structlog.processors.format_exc_info,
    ]
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if wanted.format == "json"
        else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=24)
    )
    _processors[:] = [*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter]
    _handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, renderer],
        )
    )
    levels = logging.getLevelNamesMapping()
    for method in _METHODS:
        enabled = wanted.logs(logging.ERROR if method == "exception" else levels[method.upper()])
        source = _EVERYTHING if enabled else _NOTHING
        for name in (method, f"a{method}"):
            setattr(_Logger, name, getattr(source, name))
    on = [level for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR) if wanted.logs(level)]
    logging.getLogger().setLevel(min(on, default=logging.CRITICAL))
