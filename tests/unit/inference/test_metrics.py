"""Metrics, scraped over HTTP and read with Prometheus' own parser: Triton's names, and histograms that add up."""

import asyncio
import socket
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence

import pytest
from prometheus_client import PROCESS_COLLECTOR
from prometheus_client.parser import text_string_to_metric_families

from penstock.inference.inference import Run
from penstock.inference.metrics import (
    CONTENT_TYPE,
    LoadMetrics,
    MetricsCollector,
    MetricsServer,
    VersionMetrics,
    on_loop,
    serve_metrics,
)
from penstock.inference.statistics import Statistics
from penstock.rpc.errors import StartupError

HOSTILE = 'quote " backslash \\ newline \n end'

COUNTERS = {
    "nv_inference_request_success": 5,
    "nv_inference_count": 9,
    "nv_inference_exec_count": 2,
    "nv_inference_request_duration_us": 30,
    "nv_inference_queue_duration_us": 10,
    "nv_inference_compute_input_duration_us": 1,
    "nv_inference_compute_infer_duration_us": 15,
    "nv_inference_compute_output_duration_us": 4,
    "nv_cache_num_hits_per_model": 7,
    "nv_cache_num_misses_per_model": 6,
    "nv_cache_hit_duration_per_model": 70,
    "nv_cache_miss_duration_per_model": 60,
}

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def statistics() -> Statistics:
    made = Statistics()
    made.success.add(30_999, 5)
    made.queue.add(10_000, 5)
    made.gather.add(1_500, 5)
    made.run.add(15_000, 5)
    made.settle.add(4_000, 5)
    made.cache_hit.add(70_000, 7)
    made.cache_miss.add(60_000, 6)
    made.inference_count, made.execution_count = 9, 2
    made.failures["REJECTED"] = 3
    made.failures["STRANGE"] = 1
    for rows in (1, 8, 8, 100_000):
        made.rows_histogram.observe(rows)
    for ns in (1_000, 50_000_000, 60_000_000_000):
        made.run_histogram.observe(ns)
    return made


@pytest.fixture
def versions() -> list[VersionMetrics]:
    return [VersionMetrics("m", "1", statistics(), 4), VersionMetrics(HOSTILE, "2", Statistics(), 0)]


@pytest.fixture
def server(versions: list[VersionMetrics]) -> Iterator[MetricsServer]:
    loads = LoadMetrics()
    loads.record(20_000_000, succeeded=True)
    loads.record(2_000_000_000, succeeded=False)
    running = serve_metrics("127.0.0.1", 0, MetricsCollector(lambda: versions, loads), PROCESS_COLLECTOR)
    yield running
    running.close()


def scrape(port: int, path: str = "/metrics") -> str:
    # As Prometheus asks: OpenMetrics first.
    headers = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", headers=headers)
    with urllib.request.urlopen(request, timeout=30) as response:
        assert response.headers["Content-Type"] == CONTENT_TYPE
        text: str = response.read().decode()
    return text


def parsed(text: str) -> Samples:
    """The parser calls every counter's samples _total, as OpenMetrics wants it; here they have their own names."""
    return {
        (
            sample.name if f"\n{sample.name}{{" in text else sample.name.removesuffix("_total"),
            tuple(sorted(sample.labels.items())),
        ): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def labels(model: str = "m", version: str = "1", **others: str) -> tuple[tuple[str, str], ...]:
    return tuple(sorted({"model": model, "version": version, **others}.items()))


def test_tritons_counters_have_exactly_tritons_names(server: MetricsServer) -> None:
    text = scrape(server.port)
    samples = parsed(text)
    for name, value in COUNTERS.items():
        assert samples[name, labels()] == value
        assert samples[name, labels(HOSTILE, "2")] == 0
        assert f'\n{name}{{model="m",version="1"}} {value}\n' in text
        assert f"\n# TYPE {name} counter\n" in "\n" + text
    failures = {
        reason: samples["nv_inference_request_failure", labels(reason=reason)]
        for reason in ("REJECTED", "CANCELED", "BACKEND", "OTHER", "STRANGE")
    }
    assert failures == {"REJECTED": 3, "CANCELED": 0, "BACKEND": 0, "OTHER": 0, "STRANGE": 1}
    assert samples["nv_inference_pending_request_count", labels()] == 4
    assert "# TYPE nv_inference_pending_request_count gauge\n" in text
    assert "_total{model" not in text


def test_histograms_add_up(server: MetricsServer) -> None:
    samples = parsed(scrape(server.port))

    def buckets(name: str, **of: str) -> dict[str, float]:
        return {
            dict(key)["le"]: value
            for (sample, key), value in samples.items()
            if sample == f"{name}_bucket" and of.items() <= dict(key).items()
        }

    rows = buckets("penstock_inference_batch_rows", model="m")
    assert (rows["1.0"], rows["4.0"], rows["8.0"], rows["512.0"], rows["+Inf"]) == (1, 1, 3, 3, 4)
    assert samples["penstock_inference_batch_rows_count", labels()] == 4
    assert samples["penstock_inference_batch_rows_sum", labels()] == 100_017
    run = buckets("penstock_inference_run_seconds", model="m")
    assert (run["1e-05"], run["5e-05"], run["0.05"], run["5.0"], run["+Inf"]) == (1, 1, 2, 2, 3)
    assert samples["penstock_inference_run_seconds_sum", labels()] == pytest.approx(60.050001)
    for stage in ("queue", "gather", "settle"):
        assert buckets(f"penstock_inference_{stage}_seconds", model="m")["+Inf"] == 0
    loads = buckets("penstock_model_load_seconds")
    assert (loads["0.01"], loads["0.05"], loads["5.0"], loads["+Inf"]) == (0, 1, 2, 2)
    assert samples["penstock_model_loads_total", (("result", "success"),)] == 1
    assert samples["penstock_model_loads_total", (("result", "failure"),)] == 1


def test_the_process_tells_its_memory_time_and_files(server: MetricsServer) -> None:
    text = scrape(server.port)
    samples = parsed(text)
    for name in ("process_resident_memory_bytes", "process_cpu_seconds_total", "process_open_fds"):
        assert samples[name, ()] > 0
    assert "# TYPE process_cpu_seconds_total counter\n" in text


def test_every_scrape_tells_what_is_true_then(server: MetricsServer, versions: list[VersionMetrics]) -> None:
    run = Run(rows=2, start_ns=1, gathered_ns=2, ran_ns=3, settled_ns=4)
    versions[0].statistics.succeeded(run, [])
    assert parsed(scrape(server.port))["nv_inference_exec_count", labels()] == 3
    versions.clear()
    assert not any(name.startswith("nv_") for name, _ in parsed(scrape(server.port)))


def test_other_paths_are_not_found(server: MetricsServer) -> None:
    with pytest.raises(urllib.error.HTTPError, match="404") as refused:
        scrape(server.port, "/")
    refused.value.close()


def test_a_silent_or_rude_connection_holds_nobody_up(server: MetricsServer) -> None:
    with (
        socket.create_connection(("127.0.0.1", server.port)) as silent,
        socket.create_connection(("127.0.0.1", server.port)) as rude,
    ):
        rude.sendall(b"\xff\xfe\r\n\r\n")
        assert "nv_inference_count" in scrape(server.port)
        silent.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")


def test_a_taken_port_is_a_start_up_error(server: MetricsServer) -> None:
    collector = MetricsCollector(list, LoadMetrics())
    with pytest.raises(StartupError, match="--metrics-port"):
        serve_metrics("127.0.0.1", server.port, collector)
    with pytest.raises(StartupError, match=r"192\.0\.2\.1"):
        serve_metrics("192.0.2.1", 0, collector)


def test_a_closed_server_frees_its_port() -> None:
    collector = MetricsCollector(list, LoadMetrics())
    first = serve_metrics("127.0.0.1", 0, collector)
    first.close()
    second = serve_metrics("127.0.0.1", first.port, collector)
    assert "penstock_model_loads_total" in scrape(second.port)
    second.close()


async def test_the_snapshot_is_taken_on_the_loop_that_owns_it(versions: list[VersionMetrics]) -> None:
    loop = asyncio.get_running_loop()
    asked_on: list[asyncio.AbstractEventLoop] = []

    def snapshot() -> Sequence[VersionMetrics]:
        asked_on.append(asyncio.get_running_loop())
        return versions

    server = serve_metrics("127.0.0.1", 0, MetricsCollector(on_loop(loop, snapshot), LoadMetrics()))
    assert "nv_inference_count" in await asyncio.to_thread(scrape, server.port)
    assert asked_on == [loop]
    await asyncio.to_thread(server.close)


def test_a_loop_that_does_not_answer_is_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.inference.metrics.SNAPSHOT_TIMEOUT_S", 0.05)
    loop = asyncio.new_event_loop()
    server = serve_metrics("127.0.0.1", 0, MetricsCollector(on_loop(loop, list), LoadMetrics()))
    try:
        with pytest.raises(urllib.error.HTTPError, match="503") as refused:
            scrape(server.port)
        refused.value.close()
    finally:
        server.close()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()
