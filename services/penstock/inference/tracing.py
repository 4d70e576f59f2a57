"""Traces of single requests: into files in Triton's format, or as spans to an OpenTelemetry collector.

The event loop only decides and notes numbers; a thread formats, writes and sends. Its queue is bounded, and what does
not fit is dropped and counted: a slow disk or collector must not slow answers.
"""

import contextlib
import json
import queue
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, TextIO

import structlog

from penstock.inference.inference import Run
from penstock.inference.trace_settings import OPENTELEMETRY, TRITON, TraceConfig, TraceSettings
from penstock.rpc.errors import StartupError

if TYPE_CHECKING:
    from opentelemetry.trace import Span

_QUEUE_SIZE = 10_000
_MAX_REQUEST_ID = 256
_EXPORT_TIMEOUT_S = 5
# What a file counts for beside its text: a file for each trace would otherwise use up the disk's inodes.
_FILE_BYTES = 4096

# W3C Trace Context: version, trace id, parent id, flags; flag 1 says that the caller itself is traced.
TRACEPARENT = "traceparent"

_log = structlog.get_logger("penstock.inference.tracing")


@dataclass(frozen=True, slots=True)
class Trace:
    """One request. Times are `time.perf_counter_ns`; `run` is None for one that no run answered."""

    model: str
    version: str
    request_id: str
    arrival_ns: int
    run: Run | None
    end_ns: int
    traceparent: str
    error: str
    config: TraceConfig


class Sink(Protocol):
    """Where traces go; used by one thread."""

    def write(self, trace: Trace) -> None:
        """Takes a trace; it may keep it for a while."""

    def flush(self) -> None:
        """Hands on what was written, as nothing more waits."""

    def close(self) -> None:
        """Hands on everything."""


class Tracer:
    """Asked once before a request and, if it said yes, told once after it. Lives on the event loop."""

    def __init__(
        self,
        settings: TraceSettings,
        max_file_bytes: int,
        service_name: str = "penstock-inference",
        *,
        file_suffix: str = "",
    ) -> None:
        """`max_file_bytes` bounds all trace files together: callers switch tracing on, the disk is the operator's.

        `file_suffix` stands behind the name of the settings' `trace_file`.
        Raises `StartupError` if there is a collector but not the extra `tracing`, or no such folder for trace files.
        """
        self.settings = settings
        self.dropped = 0
        self._sinks: dict[str, Sink] = {}
        if settings.trace_file:
            self._sinks[TRITON] = TraceFiles(Path(settings.trace_file + file_suffix), max_file_bytes)
        if settings.otlp_endpoint:
            self._sinks[OPENTELEMETRY] = Spans(settings.otlp_endpoint, service_name)
        self._queue: queue.Queue[Trace | None] = queue.Queue(_QUEUE_SIZE)
        self._thread: threading.Thread | None = None

    def sampled(self, model: str, traceparent: str = "") -> bool:
        """Whether this request is to be traced. To spans, a caller that is itself traced adds all of its requests."""
        if not self.settings.active:
            return False
        sampler = self.settings.sampler(model)
        forced = sampler.config.mode == OPENTELEMETRY and _caller_is_traced(traceparent)
        chosen = sampler.sample(forced)
        if chosen and not sampler.remaining:
            self.settings.refresh()
        return chosen

    def record(
        self,
        model: str,
        version: str,
        request_id: str,
        arrival_ns: int,
        run: Run | None,
        traceparent: str = "",
        error: str = "",
    ) -> None:
        """Takes a request whose answer is there, or that failed with `error`."""
        end_ns = time.perf_counter_ns()
        config = self.settings.sampler(model).config
        trace = Trace(
            model, version, request_id[:_MAX_REQUEST_ID], arrival_ns, run, end_ns, traceparent, error[:1024], config
        )
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="penstock-tracing", daemon=True)
            self._thread.start()
        try:
            self._queue.put_nowait(trace)
        except queue.Full:
            if not self.dropped:
                _log.warning("traces are dropped: they come faster than they can be written")
            self.dropped += 1

    def close(self) -> None:
        """Writes and sends what waits. Blocks, with a collector that is away for some seconds: call it in a thread."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        for sink in self._sinks.values():
            sink.close()

    def _work(self) -> None:
        failing = False
        while (trace := self._queue.get()) is not None:
            sink = self._sinks.get(trace.config.mode)
            if sink is None:
                continue
            try:
                sink.write(trace)
                if self._queue.empty():
                    sink.flush()
                failing = False
            except Exception as error:  # the next trace may be luckier; requests must not notice
                if not failing:
                    _log.error("traces are lost", error=str(error))
                failing = True


class TraceFiles:
    """JSON arrays as Triton writes them; trace_summary.py reads them. An array is closed with its file.

    Above `max_bytes` in all files together, nothing more is written.
    """

    def __init__(self, path: Path, max_bytes: int) -> None:
        if not path.parent.is_dir():
            raise StartupError(f"There is no folder {path.parent} for trace files. Create it, or change --trace-file.")
        self._path = path
        self._left_bytes = max_bytes
        self._traces = 0
        self._numbered = 0
        self._whole: _ArrayFile | None = None
        self._current: _ArrayFile | None = None

    def write(self, trace: Trace) -> None:
        if self._left_bytes <= 0:
            return
        self._traces += 1
        text = ",\n".join(json.dumps(entry, separators=(",", ":")) for entry in _entries(trace, self._traces))
        self._left_bytes -= len(text)
        if self._left_bytes <= 0:
            _log.warning("no more traces are written: their files have reached their limit", path=str(self._path))
        frequency = trace.config.log_frequency
        if frequency == 0:
            if self._whole is None:
                self._whole = _ArrayFile(self._path)
            self._whole.append(text)
            return
        if self._current is None:
            self._left_bytes -= _FILE_BYTES
            self._current = _ArrayFile(self._path.with_name(f"{self._path.name}.{self._numbered}"))
            self._numbered += 1
        self._current.append(text)
        if self._current.length >= frequency:
            self._current.close()
            self._current = None

    def flush(self) -> None:
        for file in (self._whole, self._current):
            if file is not None:
                file.flush()

    def close(self) -> None:
        for file in (self._whole, self._current):
            if file is not None:
                file.close()
        self._whole = self._current = None


class _ArrayFile:
    """A JSON array that grows."""

    def __init__(self, path: Path) -> None:
        self.length = 0
        self._file: TextIO = path.open("w", encoding="utf-8")

    def append(self, text: str) -> None:
        self._file.write((",\n" if self.length else "[\n") + text)
        self.length += 1

    def flush(self) -> None:
        self._file.flush()

    def close(self) -> None:
        self._file.write("\n]\n" if self.length else "[]\n")
        self._file.close()


def _entries(trace: Trace, number: int) -> Iterator[dict[str, object]]:
    version: int | str = int(trace.version) if trace.version.isdecimal() else trace.version
    yield {"id": number, "model_name": trace.model, "model_version": version, "request_id": trace.request_id}
    times = {"REQUEST_START": trace.arrival_ns, "QUEUE_START": trace.arrival_ns}
    if trace.run is not None:
        times |= {
            "COMPUTE_START": trace.run.start_ns,
            "COMPUTE_INPUT_END": trace.run.gathered_ns,
            "COMPUTE_OUTPUT_START": trace.run.ran_ns,
            "COMPUTE_END": trace.run.settled_ns,
        }
    times["REQUEST_END"] = trace.end_ns
    yield {"id": number, "timestamps": [{"name": name, "ns": ns} for name, ns in times.items()]}


class Spans:
    """One span a request, with a child for each stage, in batches to an OTLP collector over gRPC."""

    def __init__(self, endpoint: str, service_name: str) -> None:
        try:
            from opentelemetry import trace  # noqa: PLC0415  # an optional extra
            from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter  # noqa: PLC0415
            from opentelemetry.sdk.resources import Resource  # noqa: PLC0415
            from opentelemetry.sdk.trace import TracerProvider  # noqa: PLC0415
            from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415
            from opentelemetry.sdk.trace.sampling import ALWAYS_ON  # noqa: PLC0415
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator  # noqa: PLC0415
        except ImportError as error:
            raise StartupError(
                "--otlp-endpoint needs OpenTelemetry, which is not installed. Install it with: "
                "pip install 'penstock[tracing]'."
            ) from error
        self._api = trace
        self._propagator = TraceContextTextMapPropagator()
        # Sampling has happened when a request comes here.
        self._provider = TracerProvider(
            sampler=ALWAYS_ON, resource=Resource.create({"service.name": service_name}), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(endpoint, insecure=not endpoint.startswith("https://"), timeout=_EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("penstock.inference")

    def write(self, trace: Trace) -> None:
        # Between the clock of measurements and that of the world; read now, since the world's is adjusted.
        offset_ns = time.time_ns() - time.perf_counter_ns()
        attributes: dict[str, str | int] = {
            "penstock.model": trace.model,
            "penstock.version": trace.version,
            "penstock.request_id": trace.request_id,
        }
        if trace.run is not None:
            attributes["penstock.batch_rows"] = trace.run.rows
        request = self._tracer.start_span(
            "infer",
            context=self._propagator.extract({TRACEPARENT: trace.traceparent}),
            kind=self._api.SpanKind.SERVER,
            attributes=attributes,
            start_time=trace.arrival_ns + offset_ns,
        )
        if trace.run is not None:
            self._stages(request, trace.arrival_ns, trace.run, offset_ns)
        if trace.error:
            request.set_status(self._api.StatusCode.ERROR, trace.error)
        request.end(trace.end_ns + offset_ns)

    def _stages(self, request: "Span", arrival_ns: int, run: Run, offset_ns: int) -> None:
        context = self._api.set_span_in_context(request)
        times = (arrival_ns, run.start_ns, run.gathered_ns, run.ran_ns, run.settled_ns)
        for name, start, end in zip(("queue", "gather", "run", "settle"), times[:-1], times[1:], strict=True):
            self._tracer.start_span(name, context=context, start_time=start + offset_ns).end(end + offset_ns)

    def flush(self) -> None:
        """The SDK sends in batches by itself."""

    def close(self) -> None:
        self._provider.shutdown()


def traceparent_of(metadata: Mapping[str, str | bytes]) -> str:
    """The caller's W3C trace context; "" where it sent none."""
    value = metadata.get(TRACEPARENT, "")
    return value if isinstance(value, str) else ""


def _caller_is_traced(traceparent: str) -> bool:
    parts = traceparent.split("-", 4)
    with contextlib.suppress(IndexError, ValueError):
        return bool(int(parts[3], 16) & 1)
    return False
