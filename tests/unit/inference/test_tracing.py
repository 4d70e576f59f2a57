"""Tracing: which requests, whose settings, and what arrives in files and at a real OTLP collector."""

import json
import sys
import time
from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest

from penstock.inference.inference import Run
from penstock.inference.trace_settings import TraceConfig, TraceSettings
from penstock.inference.tracing import Tracer, traceparent_of
from penstock.oip import inference_pb2 as pb
from penstock.rpc.errors import InvalidFieldError, NotFoundError, PenstockError, StartupError, UnimplementedError

ON = {"trace_level": ["TIMESTAMPS"], "trace_rate": ["1"]}
TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
PARENT_ID = "b7ad6b7169203331"


def check_model(name: str) -> None:
    if name not in {"m", "n"}:
        raise NotFoundError("model", name)


def settings_of(trace_file: str = "/tmp/unused", endpoint: str = "", **defaults: object) -> TraceSettings:
    return TraceSettings(TraceConfig(**defaults), trace_file, endpoint, check_model)


def update(settings: TraceSettings, changes: dict[str, list[str]], model: str = "") -> dict[str, str]:
    request = pb.TraceSettingRequest(model_name=model)
    for name, value in changes.items():
        request.settings[name].SetInParent()
        request.settings[name].value.extend(value)
    return {name: " ".join(setting.value) for name, setting in settings.update(request).settings.items()}


def sampled(tracer: Tracer, model: str, count: int) -> list[bool]:
    return [tracer.sampled(model) for _ in range(count)]


def run_of(start_ns: int) -> Run:
    return Run(3, start_ns + 1000, start_ns + 2000, start_ns + 4000, start_ns + 8000)


def test_off_until_it_is_switched_on_and_every_nth_request_then() -> None:
    tracer = Tracer(settings_of(), 10**6)
    assert not tracer.settings.active
    assert sampled(tracer, "m", 3) == [False] * 3
    answer = update(tracer.settings, {"trace_level": ["TIMESTAMPS"], "trace_rate": ["3"]})
    assert answer == {
        "trace_file": "/tmp/unused",
        "trace_level": "TIMESTAMPS",
        "trace_rate": "3",
        "trace_count": "-1",
        "log_frequency": "0",
        "trace_mode": "triton",
    }
    assert sampled(tracer, "m", 7) == [False, False, True, False, False, True, False]


def test_a_count_runs_down_and_then_tracing_costs_nothing_again() -> None:
    tracer = Tracer(settings_of(), 10**6)
    update(tracer.settings, ON | {"trace_count": ["2"]})
    assert sampled(tracer, "m", 4) == [True, True, False, False]
    assert not tracer.settings.active
    assert update(tracer.settings, {})["trace_count"] == "0"
    # Another setting leaves it where it is, the count itself starts it anew.
    update(tracer.settings, {"trace_rate": ["1"]})
    assert sampled(tracer, "m", 1) == [False]
    update(tracer.settings, {"trace_count": ["2"]})
    assert sampled(tracer, "m", 3) == [True, True, False]


def test_a_models_own_settings_follow_the_global_ones_where_they_say_nothing() -> None:
    settings = settings_of()
    tracer = Tracer(settings, 10**6)
    assert update(settings, ON, "m")["trace_level"] == "TIMESTAMPS"
    assert update(settings, {})["trace_level"] == "OFF"
    assert sampled(tracer, "n", 1) + sampled(tracer, "m", 1) == [False, True]
    update(settings, {"log_frequency": ["7"]})
    assert update(settings, {}, "m")["log_frequency"] == "7"
    update(settings, {"trace_level": ["OFF"]}, "m")
    update(settings, ON)
    assert sampled(tracer, "n", 1) + sampled(tracer, "m", 1) == [True, False]
    # Cleared, the model is like the others again; a cleared global setting is the operator's.
    assert update(settings, {"trace_level": [], "trace_rate": []}, "m")["trace_level"] == "TIMESTAMPS"
    assert update(settings, {"trace_level": [], "trace_rate": []})["trace_rate"] == "1000"
    assert not settings.active


@pytest.mark.parametrize(
    ("changes", "error", "text"),
    [
        ({"trace_file": ["/etc/passwd"]}, InvalidFieldError, "only the operator"),
        ({"trace_file": []}, InvalidFieldError, "only the operator"),
        ({"trace_depth": ["1"]}, InvalidFieldError, "there are trace_file, trace_level"),
        ({"trace_level": ["TENSORS"]}, UnimplementedError, "Trace TIMESTAMPS"),
        ({"trace_level": ["LOUD"]}, InvalidFieldError, "expected OFF or TIMESTAMPS; got 'LOUD'"),
        ({"trace_level": ["OFF", "TIMESTAMPS"]}, InvalidFieldError, "expected one value"),
        ({"trace_rate": ["0"]}, InvalidFieldError, "expected a number from 1 to"),
        ({"trace_rate": ["9" * 10_000]}, InvalidFieldError, "expected a number from 1 to"),
        ({"trace_count": ["-2"]}, InvalidFieldError, "expected a number from -1 to"),
        ({"log_frequency": ["x"]}, InvalidFieldError, "expected a number from 0 to"),
        ({"trace_mode": ["jaeger"]}, InvalidFieldError, "expected triton or opentelemetry"),
        ({"trace_mode": ["opentelemetry"]}, InvalidFieldError, "--otlp-endpoint"),
    ],
)
@pytest.mark.parametrize("model", ["", "m"])
def test_a_wrong_setting_changes_nothing(
    changes: dict[str, list[str]], error: type[PenstockError], text: str, model: str
) -> None:
    settings = settings_of()
    with pytest.raises(error) as refused:
        update(settings, ON | changes, model)
    assert text in refused.value.message
    assert not settings.active
    assert update(settings, {}, model)["trace_level"] == "OFF"


def test_tracing_without_a_destination_is_refused() -> None:
    with pytest.raises(InvalidFieldError, match="--trace-file"):
        update(settings_of(""), ON)
    with pytest.raises(StartupError, match="--trace-file"):
        settings_of("", level="TIMESTAMPS")
    with pytest.raises(StartupError, match="no folder"):
        Tracer(settings_of("/no/such/folder/trace.json"), 10**6)


def test_an_unknown_model_has_no_settings() -> None:
    with pytest.raises(NotFoundError):
        update(settings_of(), ON, "made up")


def test_a_file_has_tritons_form(tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    tracer = Tracer(settings_of(str(file)), 10**6)
    update(tracer.settings, ON)
    assert tracer.sampled("m")
    tracer.record("m", "2", 'an "id"' + "x" * 1000, 5, run_of(5))
    tracer.record("m", "2", "", 7, None, error="queue full")
    tracer.close()
    first, times, second, short = json.loads(file.read_text())
    assert first["id"] == times["id"] == 1
    assert (first["model_name"], first["model_version"], first["request_id"][:8]) == ("m", 2, 'an "id"x')
    assert len(first["request_id"]) == 256
    stamps = [(stamp["name"], stamp["ns"]) for stamp in times["timestamps"]]
    assert stamps[:-1] == [
        ("REQUEST_START", 5),
        ("QUEUE_START", 5),
        ("COMPUTE_START", 1005),
        ("COMPUTE_INPUT_END", 2005),
        ("COMPUTE_OUTPUT_START", 4005),
        ("COMPUTE_END", 8005),
    ]
    assert stamps[-1][0] == "REQUEST_END"
    assert second["id"] == 2
    assert [stamp["name"] for stamp in short["timestamps"]] == ["REQUEST_START", "QUEUE_START", "REQUEST_END"]


def test_log_frequency_makes_numbered_files(tmp_path: Path) -> None:
    tracer = Tracer(settings_of(str(tmp_path / "trace.json")), 10**6)
    update(tracer.settings, ON | {"log_frequency": ["2"]})
    for number in range(5):
        tracer.record("m", "1", str(number), 0, run_of(0))
    tracer.close()
    files = sorted(tmp_path.iterdir())
    assert [file.name for file in files] == ["trace.json.0", "trace.json.1", "trace.json.2"]
    ids = [[entry["request_id"] for entry in json.loads(file.read_text()) if "request_id" in entry] for file in files]
    assert ids == [["0", "1"], ["2", "3"], ["4"]]


@pytest.mark.parametrize("frequency", ["0", "1"])
def test_files_stay_within_their_limit_and_stay_json(tmp_path: Path, frequency: str) -> None:
    tracer = Tracer(settings_of(str(tmp_path / "trace.json")), 20_000)
    update(tracer.settings, ON | {"log_frequency": [frequency]})
    for _ in range(1000):
        tracer.record("m", "1", "", 0, run_of(0))
    tracer.close()
    files = list(tmp_path.iterdir())
    assert len(files) <= 5
    assert sum(file.stat().st_size for file in files) < 25_000
    assert all(json.loads(file.read_text()) for file in files)


def test_traces_that_come_too_fast_are_dropped_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.inference.tracing._QUEUE_SIZE", 1)
    tracer = Tracer(settings_of(str(tmp_path / "trace.json")), 10**8)
    update(tracer.settings, ON)
    started = time.perf_counter()
    for _ in range(20_000):
        tracer.record("m", "1", "", 0, run_of(0))
    tracer.close()
    assert time.perf_counter() - started < 60
    written = len(json.loads((tmp_path / "trace.json").read_text())) // 2
    assert tracer.dropped > 0
    assert written + tracer.dropped == 20_000


def test_a_file_that_cannot_be_written_harms_nobody(tmp_path: Path) -> None:
    (tmp_path / "trace.json").mkdir()
    tracer = Tracer(settings_of(str(tmp_path / "trace.json")), 10**6)
    for _ in range(3):
        tracer.record("m", "1", "", 0, run_of(0))
    tracer.close()


Exports = list[object]


@pytest.fixture
def collector() -> Iterator[tuple[str, Exports]]:
    """A real OTLP collector, as far as it goes: it keeps the spans that come over the wire."""
    pytest.importorskip("opentelemetry.sdk", reason="the extra 'tracing' is not installed")
    from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc

    requests: Exports = []

    class Collector(trace_service_pb2_grpc.TraceServiceServicer):
        def Export(
            self, request: "trace_service_pb2.ExportTraceServiceRequest", context: object
        ) -> "trace_service_pb2.ExportTraceServiceResponse":
            requests.append(request)
            return trace_service_pb2.ExportTraceServiceResponse()

    server = grpc.server(futures.ThreadPoolExecutor(2))
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(Collector(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"http://127.0.0.1:{port}", requests
    server.stop(0).wait()


@pytest.mark.parametrize("parent", [True, False])
def test_spans_arrive_at_the_collector(collector: tuple[str, Exports], parent: bool) -> None:
    endpoint, requests = collector
    tracer = Tracer(settings_of("", endpoint, mode="opentelemetry", level="TIMESTAMPS", rate=1), 0)
    assert tracer.sampled("m")
    arrival_ns = time.perf_counter_ns() - 1_000_000
    traceparent = f"00-{TRACE_ID}-{PARENT_ID}-01" if parent else "no such thing"
    tracer.record("m", "2", "id", arrival_ns, run_of(arrival_ns), traceparent)
    tracer.record("m", "2", "failed", arrival_ns, None, error="The queue is full.")
    tracer.close()
    resources = [spans for request in requests for spans in request.resource_spans]  # type: ignore[attr-defined]
    assert {
        item.value.string_value for one in resources for item in one.resource.attributes if item.key == "service.name"
    } == {"penstock-inference"}
    spans = [span for resource in resources for scope in resource.scope_spans for span in scope.spans]
    by_name = {span.name: span for span in spans if not span.status.code}
    assert set(by_name) == {"queue", "gather", "run", "settle", "infer"}
    root = by_name["infer"]
    assert (root.trace_id.hex() == TRACE_ID) == parent
    assert root.parent_span_id.hex() == (PARENT_ID if parent else "")
    assert abs(root.start_time_unix_nano - time.time_ns()) < 60e9
    durations = {}
    for name, span in by_name.items():
        durations[name] = span.end_time_unix_nano - span.start_time_unix_nano
        if span is not root:
            assert (span.trace_id, span.parent_span_id) == (root.trace_id, root.span_id)
    assert {name: durations[name] for name in ("queue", "gather", "run", "settle")} == {
        "queue": 1000,
        "gather": 1000,
        "run": 2000,
        "settle": 4000,
    }
    attributes = {item.key: item.value.string_value or item.value.int_value for item in root.attributes}
    assert attributes == {
        "penstock.model": "m",
        "penstock.version": "2",
        "penstock.request_id": "id",
        "penstock.batch_rows": 3,
    }
    (failed,) = [span for span in spans if span.status.code]
    assert (failed.name, failed.status.message) == ("infer", "The queue is full.")


def test_a_traced_caller_adds_all_of_its_requests_to_spans(collector: tuple[str, Exports]) -> None:
    settings = settings_of("/tmp/unused", collector[0], mode="opentelemetry", level="TIMESTAMPS")
    tracer = Tracer(settings, 0)
    traced, untraced = (f"00-{TRACE_ID}-{PARENT_ID}-0{flag}" for flag in "10")
    assert tracer.sampled("m", traced)
    assert not tracer.sampled("m", untraced)
    assert not tracer.sampled("m", "00-zz-zz-zz")
    update(settings, {"trace_mode": ["triton"]})
    assert not tracer.sampled("m", traced)
    update(settings, {"trace_mode": [], "trace_level": ["OFF"]})
    assert not tracer.sampled("m", traced)
    tracer.close()


def test_spans_without_the_extra_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace", None)
    with pytest.raises(StartupError, match=r"penstock\[tracing\]"):
        Tracer(settings_of("", "http://127.0.0.1:4317"), 0)


def test_the_callers_context_is_read_from_metadata() -> None:
    assert traceparent_of({"traceparent": "00-a-b-01"}) == "00-a-b-01"
    assert traceparent_of({"traceparent": b"\xff"}) == traceparent_of({}) == ""
