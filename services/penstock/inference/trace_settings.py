"""The RPC TraceSetting: which requests are traced, for all models and for single ones (Triton's extension)."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from penstock.oip import inference_pb2 as pb
from penstock.rpc.errors import InvalidFieldError, StartupError, UnimplementedError

FILE = "trace_file"
LEVEL = "trace_level"
RATE = "trace_rate"
COUNT = "trace_count"
FREQUENCY = "log_frequency"
MODE = "trace_mode"
SETTINGS = (FILE, LEVEL, RATE, COUNT, FREQUENCY, MODE)

OFF = "OFF"
TIMESTAMPS = "TIMESTAMPS"
TRITON = "triton"
OPENTELEMETRY = "opentelemetry"

_NUMBER = re.compile(r"-1|[0-9]{1,10}")
_MOST = 2**31 - 1


@dataclass(frozen=True)
class TraceConfig:
    """Every `rate`-th request is traced, `count` of them (−1: without end).

    `log_frequency` traces make a file, `trace_file.0` and on; 0: all go into `trace_file`.
    """

    level: str = OFF
    rate: int = 1000
    count: int = -1
    log_frequency: int = 0
    mode: str = TRITON


@dataclass(slots=True)
class Sampler:
    """Decides which requests are traced. Models without settings of their own share one."""

    config: TraceConfig
    remaining: int
    seen: int = 0

    @property
    def on(self) -> bool:
        return self.config.level != OFF and self.remaining != 0

    def sample(self, forced: bool) -> bool:
        """Counts one request; `forced` ones are traced whatever the rate."""
        if not self.on:
            return False
        self.seen += 1
        if not forced and self.seen % self.config.rate:
            return False
        if self.remaining > 0:
            self.remaining -= 1
        return True


@dataclass
class TraceSettings:
    """Owns the settings. Lives on the event loop.

    `defaults` are the operator's; a global setting that is cleared returns to them. `trace_file` and `otlp_endpoint`
    are the operator's too, and "" where that kind of trace has nowhere to go. `check_model` raises for an unknown
    model: without it callers could make up names without end.
    """

    defaults: TraceConfig
    trace_file: str
    otlp_endpoint: str
    check_model: Callable[[str], object]
    # Whether any request may be traced at all; the hot path asks nothing else while tracing is off.
    active: bool = field(init=False)

    def __post_init__(self) -> None:
        """Raises `StartupError` if the operator switched tracing on without a destination."""
        try:
            self._check_destination(self.defaults)
        except InvalidFieldError as error:
            raise StartupError(f"Wrong configuration of tracing: {error.message}.") from error
        self._global: dict[str, Any] = {}
        self._overrides: dict[str, dict[str, Any]] = {}
        self._samplers: dict[str, Sampler] = {}
        self._shared = _sampler(self.defaults)
        self.refresh()

    def sampler(self, model: str) -> Sampler:
        return self._samplers.get(model, self._shared)

    def refresh(self) -> None:
        """Finds out anew whether any request may be traced; to be called when a sampler has come to its end."""
        self.active = self._shared.on or any(sampler.on for sampler in self._samplers.values())

    def update(self, request: pb.TraceSettingRequest) -> pb.TraceSettingResponse:
        """Changes what the request names, and nothing if any of it is wrong; answers the model's settings then.

        An empty value takes a setting back: a model's to the global one, a global one to the operator's.
        Raises `InvalidFieldError` for an unknown setting, a wrong value, another file, or a mode that the operator
        gave no destination; `UnimplementedError` for the level TENSORS; what `check_model` raises.
        """
        model = request.model_name
        if model:
            self.check_model(model)
        changes = _changes({name: list(value.value) for name, value in request.settings.items()})
        scope = self._overrides.get(model, {}) if model else self._global
        merged = {name: value for name, value in (scope | changes).items() if value is not None}
        if model:
            self._check_destination(replace(self._global_config(), **merged))
            self._overrides.pop(model, None)
            if merged:
                self._overrides[model] = merged
        else:
            config = replace(self.defaults, **merged)
            for override in ({}, *self._overrides.values()):
                self._check_destination(replace(config, **override))
            self._global = merged
        self._rebuild(model, counts_anew="count" in changes)
        return self._response(model)

    def _global_config(self) -> TraceConfig:
        return replace(self.defaults, **self._global)

    def _rebuild(self, changed: str, counts_anew: bool) -> None:
        """Samplers for the settings as they are now; a count that was not set anew goes on where it stood."""
        before = self._samplers
        config = self._global_config()
        self._shared = _sampler(config, None if counts_anew and not changed else self._shared)
        self._samplers = {
            model: _sampler(
                replace(config, **override), None if counts_anew and model == changed else before.get(model)
            )
            for model, override in self._overrides.items()
        }
        self.refresh()

    def _check_destination(self, config: TraceConfig) -> None:
        if config.level == OFF:
            return
        if config.mode == TRITON and not self.trace_file:
            raise InvalidFieldError.of(
                f"settings[{LEVEL}]", "there is no file for traces; the operator names one with --trace-file"
            )
        if config.mode == OPENTELEMETRY and not self.otlp_endpoint:
            raise InvalidFieldError.of(
                f"settings[{MODE}]", "there is no collector for spans; the operator names one with --otlp-endpoint"
            )

    def _response(self, model: str) -> pb.TraceSettingResponse:
        sampler = self.sampler(model)
        config = sampler.config
        values = {
            FILE: self.trace_file,
            LEVEL: config.level,
            RATE: str(config.rate),
            COUNT: str(sampler.remaining),
            FREQUENCY: str(config.log_frequency),
            MODE: config.mode,
        }
        response = pb.TraceSettingResponse()
        for name, value in values.items():
            response.settings[name].value.append(value)
        return response


def _sampler(config: TraceConfig, before: Sampler | None = None) -> Sampler:
    if before is None or before.config.count != config.count:
        return Sampler(config, config.count)
    return Sampler(config, before.remaining, before.seen)


# A setting's field of TraceConfig.
_FIELDS = {LEVEL: "level", RATE: "rate", COUNT: "count", FREQUENCY: "log_frequency", MODE: "mode"}
_LOWEST = {RATE: 1, COUNT: -1, FREQUENCY: 0}


def _changes(settings: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """New values by field of TraceConfig; None takes a setting back."""
    changes: dict[str, Any] = {}
    for name, values in sorted(settings.items()):
        if name == FILE:
            raise InvalidFieldError.of(
                f"settings[{FILE}]", "it cannot be changed: only the operator, with --trace-file, says where files go"
            )
        if name not in _FIELDS:
            raise InvalidFieldError.of(
                f"settings[{name[:80]}]", f"there is no such setting; there are {', '.join(SETTINGS)}"
            )
        changes[_FIELDS[name]] = _parsed(name, values) if values else None
    return changes


def _parsed(name: str, values: Sequence[str]) -> str | int:
    if len(set(values)) > 1:
        raise _wrong(name, "one value", ", ".join(values))
    value = values[0]
    if name == LEVEL:
        if value == "TENSORS":
            raise UnimplementedError(
                "This server traces no tensors: they are what its callers would not want in a file. Trace TIMESTAMPS, "
                "and log tensors where they are sent."
            )
        return _one_of(name, value, (OFF, TIMESTAMPS))
    if name == MODE:
        return _one_of(name, value, (TRITON, OPENTELEMETRY))
    lowest = _LOWEST[name]
    if not _NUMBER.fullmatch(value) or not lowest <= int(value) <= _MOST:
        raise _wrong(name, f"a number from {lowest} to {_MOST}", value)
    return int(value)


def _one_of(name: str, value: str, choices: Sequence[str]) -> str:
    if value not in choices:
        raise _wrong(name, " or ".join(choices), value)
    return value


def _wrong(name: str, expected: str, came: str) -> InvalidFieldError:
    return InvalidFieldError.of(f"settings[{name}]", f"expected {expected}; got {came[:80]!r}")
