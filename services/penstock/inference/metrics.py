"""Prometheus metrics: Triton's names with Triton's meaning, and histograms of our own.

Requests only add to the plain numbers of `penstock.inference.statistics`; everything here happens when somebody reads.
"""

import asyncio
import functools
import http.server
import socket
import socketserver
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from prometheus_client import Metric
from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily

from penstock.inference.statistics import Histogram, Statistics
from penstock.rpc.errors import PenstockError, StartupError

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_LABELS = ("model", "version")
_FAILURES = ("REJECTED", "CANCELED", "BACKEND", "OTHER")
_NS = 1e-9
_LOAD_BOUNDS_NS = tuple(int(bound * 1e9) for bound in (0.01, 0.05, 0.1, 0.5, 1, 5, 10, 30, 60, 120, 300, 600))
# How long a reader's thread waits for an event loop, this worker's or another's.
SNAPSHOT_TIMEOUT_S = 5.0
_CONNECTION_TIMEOUT_S = 10.0

_Told = TypeVar("_Told")


@dataclass(frozen=True)
class VersionMetrics:
    """What is told of one version. `pending` requests wait."""

    model: str
    version: str
    statistics: Statistics
    pending: int


@dataclass
class LoadMetrics:
    """Loads of versions since the server started; the versions themselves come and go."""

    succeeded: int = 0
    failed: int = 0
    durations: Histogram = field(default_factory=lambda: Histogram(_LOAD_BOUNDS_NS))

    def record(self, duration_ns: int, *, succeeded: bool) -> None:
        if succeeded:
            self.succeeded += 1
        else:
            self.failed += 1
        self.durations.observe(duration_ns)


class Collector(Protocol):
    """Prometheus' own interface."""

    def collect(self) -> Iterable[Metric]:
        """Metrics as they are now."""


# Name, meaning, and value of Triton's counters.
_COUNTERS: Sequence[tuple[str, str, Callable[[Statistics], int]]] = (
    ("nv_inference_request_success", "Number of successful inference requests", lambda s: s.success.count),
    ("nv_inference_count", "Number of inferences performed: rows, without cached ones", lambda s: s.inference_count),
    ("nv_inference_exec_count", "Number of model executions performed", lambda s: s.execution_count),
    (
        "nv_inference_request_duration_us",
        "Cumulative request duration in microseconds, with cached ones",
        lambda s: s.success.ns // 1000,
    ),
    ("nv_inference_queue_duration_us", "Cumulative time in the queue in microseconds", lambda s: s.queue.ns // 1000),
    (
        "nv_inference_compute_input_duration_us",
        "Cumulative time of gathering inputs in microseconds",
        lambda s: s.gather.ns // 1000,
    ),
    (
        "nv_inference_compute_infer_duration_us",
        "Cumulative time of running the model in microseconds",
        lambda s: s.run.ns // 1000,
    ),
    (
        "nv_inference_compute_output_duration_us",
        "Cumulative time of handing out outputs in microseconds",
        lambda s: s.settle.ns // 1000,
    ),
    ("nv_cache_num_hits_per_model", "Number of requests answered from the cache", lambda s: s.cache_hit.count),
    ("nv_cache_num_misses_per_model", "Number of requests that the cache did not know", lambda s: s.cache_miss.count),
    (
        "nv_cache_hit_duration_per_model",
        "Cumulative time of looking up hits in microseconds",
        lambda s: s.cache_hit.ns // 1000,
    ),
    (
        "nv_cache_miss_duration_per_model",
        "Cumulative time of looking up and keeping misses in microseconds",
        lambda s: s.cache_miss.ns // 1000,
    ),
)

# Name, meaning, unit of one count, and histogram.
_HISTOGRAMS: Sequence[tuple[str, str, float, Callable[[Statistics], Histogram]]] = (
    ("penstock_inference_queue_seconds", "Time of a request in the queue", _NS, lambda s: s.queue_histogram),
    ("penstock_inference_gather_seconds", "Time of gathering a batch", _NS, lambda s: s.gather_histogram),
    ("penstock_inference_run_seconds", "Time of one run of the model", _NS, lambda s: s.run_histogram),
    ("penstock_inference_settle_seconds", "Time of handing out a batch's answers", _NS, lambda s: s.settle_histogram),
    ("penstock_inference_batch_rows", "Rows in one run", 1, lambda s: s.rows_histogram),
)


class MetricsCollector:
    """Metrics of the versions that `snapshot` tells, which is called on the reader's thread: see `on_loop`."""

    def __init__(self, snapshot: Callable[[], Sequence[VersionMetrics]], loads: LoadMetrics) -> None:
        self._snapshot = snapshot
        self._loads = loads

    def collect(self) -> Iterator[Metric]:
        versions = self._snapshot()
        for name, meaning, value in _COUNTERS:
            yield _per_version(name, meaning, "counter", [(one, value(one.statistics)) for one in versions])
        yield _failures(versions)
        pending = [(one, one.pending) for one in versions]
        yield _per_version(
            "nv_inference_pending_request_count", "Number of requests waiting to be run", "gauge", pending
        )
        for name, meaning, unit, histogram in _HISTOGRAMS:
            family = HistogramMetricFamily(name, meaning, labels=_LABELS)
            for one in versions:
                _add_histogram(family, (one.model, one.version), histogram(one.statistics), unit)
            yield family
        loads = CounterMetricFamily("penstock_model_loads", "Loads of model versions", labels=("result",))
        loads.add_metric(("success",), self._loads.succeeded)
        loads.add_metric(("failure",), self._loads.failed)
        yield loads
        load_seconds = HistogramMetricFamily("penstock_model_load_seconds", "Time of loading a version", labels=())
        _add_histogram(load_seconds, (), self._loads.durations, _NS)
        yield load_seconds


def _per_version(name: str, meaning: str, kind: str, values: Iterable[tuple[VersionMetrics, int]]) -> Metric:
    # Not CounterMetricFamily: it adds _total, and dashboards made for Triton look for its names.
    family = Metric(name, meaning, kind)
    for one, value in values:
        family.add_sample(name, {"model": one.model, "version": one.version}, value)
    return family


def _failures(versions: Iterable[VersionMetrics]) -> Metric:
    name = "nv_inference_request_failure"
    family = Metric(name, "Number of failed inference requests", "counter")
    for one in versions:
        # The event loop may add a reason meanwhile; a copy is made in one step.
        counts = dict.fromkeys(_FAILURES, 0) | one.statistics.failures.copy()
        for reason, count in counts.items():
            family.add_sample(name, {"model": one.model, "version": one.version, "reason": reason}, count)
    return family


def _add_histogram(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram, unit: float) -> None:
    counts = histogram.counts.copy()
    buckets: list[tuple[str, float]] = []
    total = 0
    # Ten digits: 5e-05 is meant, not 5.0000000000000004e-05.
    bounds = [repr(float(f"{bound * unit:.10g}")) for bound in histogram.bounds]
    for bound, count in zip([*bounds, "+Inf"], counts, strict=True):
        total += count
        buckets.append((bound, total))
    family.add_metric(labels, buckets, sum_value=histogram.sum * unit)


def on_loop(
    loop: asyncio.AbstractEventLoop, snapshot: Callable[[], Sequence[VersionMetrics]]
) -> Callable[[], Sequence[VersionMetrics]]:
    """The snapshot, taken on the event loop that owns what it reads, for a thread that waits.

    Raises `TimeoutError` if the loop does not answer within seconds.
    """

    async def take() -> Sequence[VersionMetrics]:
        return snapshot()

    return awaited_on_loop(loop, take)


def awaited_on_loop(
    loop: asyncio.AbstractEventLoop, ask: Callable[[], Coroutine[Any, Any, _Told]]
) -> Callable[[], _Told]:
    """As `on_loop`, for what the loop itself has to wait for."""
    return lambda: asyncio.run_coroutine_threadsafe(ask(), loop).result(SNAPSHOT_TIMEOUT_S)


def exposition(collectors: Iterable[Collector]) -> str:
    """Prometheus' text format.

    prometheus_client's own would write `# TYPE nv_inference_count_total` above samples without _total, and OpenMetrics,
    which Prometheus asks for first, does not know counters of such names; so this is the only format.
    """
    lines: list[str] = []
    for collector in collectors:
        for family in collector.collect():
            samples = family.samples
            name = samples[0].name if family.type == "counter" and samples else family.name
            meaning = family.documentation.replace("\\", r"\\").replace("\n", r"\n")
            lines += [f"# HELP {name} {meaning}", f"# TYPE {name} {family.type}"]
            for sample in samples:
                labels = ",".join(f'{label}="{_escaped(value)}"' for label, value in sample.labels.items())
                lines.append(f"{sample.name}{{{labels}}} {sample.value!r}")
    return "\n".join(lines) + "\n"


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace("\n", r"\n").replace('"', r"\"")


class MetricsServer:
    """Answers GET /metrics on its own threads."""

    def __init__(self, server: socketserver.ThreadingTCPServer) -> None:
        self._server = server
        self.port: int = server.socket.getsockname()[1]
        self._thread = threading.Thread(
            target=functools.partial(server.serve_forever, poll_interval=0.1), name="penstock-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Takes no more connections and returns soon."""
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def serve_metrics(host: str, port: int, *collectors: Collector) -> MetricsServer:
    """Serves the collectors' metrics; 503 if one raises `TimeoutError` or a `PenstockError`. Port 0 takes a free one.

    Raises `StartupError` if the address cannot be had.
    """

    class Handler(http.server.BaseHTTPRequestHandler):
        # A connection that says nothing must not keep a thread for ever.
        timeout = _CONNECTION_TIMEOUT_S

        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404, "Metrics are at /metrics")
                return
            try:
                body = exposition(collectors).encode()
            except (TimeoutError, PenstockError):
                self.send_error(503, "The server, or one of its workers, is busy, starting or stopping")
                return
            self.send_response(200)
            self.send_header("Content-Type", CONTENT_TYPE)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Readers come every few seconds; nobody wants a line for each."""

    # Not http.server's: it asks DNS for the host's name, which can take long.
    class Server(socketserver.ThreadingTCPServer):
        address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        allow_reuse_address = True
        daemon_threads = True
        block_on_close = False

        def handle_error(self, *_: object) -> None:
            """A reader that hangs up is no event."""

    try:
        return MetricsServer(Server((host.strip("[]"), port), Handler))
    except OSError as error:
        raise StartupError(
            f"Cannot serve metrics on {host}:{port}: {error.strerror}. Choose another port with --metrics-port "
            f"(0 takes a free one)."
        ) from error
