"""ModelStreamInfer on either transport: what goes wrong with one request, or one client, is nobody else's."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from onnx import helper
from tests.integration.inference import graphs
from tests.integration.inference.fleet import WAIT_S, infer_request, put_model
from tests.integration.rpc.conformance import TRANSPORTS

from penstock.oip import inference_pb2 as pb
from penstock.oip.inference_pb2_grpc import GRPCInferenceServiceStub

MESSAGE_MIB = 8

# What the server has asked of the model's answer fails in a way that the server does not expect.
ODD = """
class Odd(dict):
    def __getitem__(self, key):
        raise ValueError("a secret")

class Model:
    def __init__(self, config): pass
    def infer(self, inputs, parameters): return Odd(same=inputs["given"])
"""
ODD_CONFIG = """
backend: "python"
input { name: "given" data_type: TYPE_FP32 dims: [1] }
output { name: "same" data_type: TYPE_FP32 dims: [1] }
"""


@dataclass
class Server:
    process: "subprocess.Popen[bytes]"
    oip: GRPCInferenceServiceStub
    log: Path
    traces: Path

    def resident_mib(self) -> float:
        """What all processes hold; those that envoy runs in are children."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        texts = [Path(f"/proc/{pid}/status").read_text() for pid in [self.process.pid, *children]]
        return sum(int(text.split("VmRSS:")[1].split()[0]) for text in texts) / 1024

    def errors(self) -> list[str]:
        return [line for line in self.log.read_text().splitlines() if '"level": "error"' in line]


@pytest.fixture(scope="module", params=TRANSPORTS)
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder, run = tmp_path_factory.mktemp("models"), tmp_path_factory.mktemp("run")
    expand = [helper.make_node("Expand", ["value", "shape"], ["wide"])]
    wide = [graphs.value("value", "FP32", ["one", 1]), graphs.value("shape", "INT64", [2])]
    put_model(folder, "wide", graphs.bundle_of(expand, wide, [graphs.value("wide", "FP32", ["rows", "columns"])]))
    put_model(folder, "scale", graphs.scale(2))
    put_model(folder, "odd", graphs.Bundle({"model.py": ODD.encode()}, graphs.scale(1).signature), config=ODD_CONFIG)
    ready, log = run / "ready", run / "log"
    flags = ["--repository", folder, "--transport", request.param, "--port", "0", "--metrics-port", "-1"]
    flags += ["--home", run, "--ready-file", ready, "--log-format", "json", "--max-message-mib", str(MESSAGE_MIB)]
    flags += ["--trace-file", run / "traces"]
    with log.open("wb") as stderr:
        command = [sys.executable, "-m", "penstock.cli", "serve", "inference", *map(str, flags)]
        process = subprocess.Popen(command, stderr=stderr)
    try:
        eventually(ready.exists)
        options = [("grpc.max_receive_message_length", -1)]
        with grpc.insecure_channel(ready.read_text(), options=options) as channel:
            oip = GRPCInferenceServiceStub(channel)
            eventually(lambda: oip.ServerReady(pb.ServerReadyRequest(), wait_for_ready=True).ready)
            yield Server(process, oip, log, run / "traces")
    finally:
        process.terminate()
        assert process.wait(WAIT_S) == 0


def eventually(holds: Callable[[], bool]) -> None:
    limit = time.monotonic() + WAIT_S
    while not holds():
        assert time.monotonic() < limit
        time.sleep(0.05)


def wide(mib: float, request_id: str = "") -> pb.ModelInferRequest:
    """A small request whose answer is large."""
    shape = np.array([mib * 4, 2**16], np.int64)
    request = infer_request("wide", {"value": np.ones((1, 1), np.float32), "shape": shape})
    request.id = request_id
    return request


def scale(request_id: str = "") -> pb.ModelInferRequest:
    request = infer_request("scale", {"rows": np.ones((1, 4), np.float32)})
    request.id = request_id
    return request


def test_a_request_that_fails_ends_no_stream_whatever_it_fails_with(server: Server) -> None:
    odd = infer_request("odd", {"given": np.ones(1, np.float32)})
    before = len(server.errors())
    requests = [scale("a"), wide(MESSAGE_MIB + 1, "b"), scale("c"), odd, scale("d")]
    answers = list(server.oip.ModelStreamInfer(iter(requests), timeout=WAIT_S))
    assert [answer.infer_response.id for answer in answers] == ["a", "b", "c", "", "d"]
    messages = [answer.error_message for answer in answers]
    assert "this server sends at most 8,388,608 in a message" in messages[1]
    assert messages[3].startswith("Internal error in request ")
    assert messages[0] == messages[2] == messages[4] == ""
    assert messages[3].split()[-1].rstrip(".") in server.log.read_text()
    assert ["a secret" in line for line in server.errors()[before:]] == [True]


def test_a_reader_that_leaves_takes_everything_with_it_and_leaves_no_error(server: Server) -> None:
    before_mib = server.resident_mib()
    errors, resident_mib = len(server.errors()), []
    open_until = threading.Event()

    def unended() -> Iterator[pb.ModelInferRequest]:
        yield from (wide(4) for _ in range(100))
        open_until.wait(WAIT_S)

    for _ in range(8):
        call = server.oip.ModelStreamInfer(unended())
        next(call)
        time.sleep(0.3)
        call.cancel()
        resident_mib.append(server.resident_mib())
    open_until.set()
    # The answers to all of their requests were 3,200 MiB; a stream holds a few times 16 MiB.
    assert resident_mib[-1] < before_mib + 250
    list(server.oip.ModelStreamInfer(iter([scale()]), timeout=WAIT_S))
    assert server.errors()[errors:] == []
    assert "was destroyed but it is pending" not in server.log.read_text()
    assert "Traceback" not in server.log.read_text().partition("a secret")[2].partition("\n")[2]


def test_the_requests_of_a_stream_are_traced(server: Server) -> None:
    on = pb.TraceSettingRequest()
    on.settings["trace_level"].value.append("TIMESTAMPS")
    on.settings["trace_rate"].value.append("1")
    server.oip.TraceSetting(on)
    odd = infer_request("odd", {"given": np.ones((1, 4), np.float32)})
    list(server.oip.ModelStreamInfer(iter([scale("first"), scale("second"), odd]), timeout=WAIT_S))
    off = pb.TraceSettingRequest()
    off.settings["trace_level"].value.append("OFF")
    server.oip.TraceSetting(off)
    eventually(lambda: server.traces.exists() and "second" in server.traces.read_text())
    traces = json.loads(server.traces.read_text().rstrip().rstrip("]") + "]")
    assert {one["request_id"] for one in traces if "request_id" in one} >= {"first", "second"}
    names = [[stamp["name"] for stamp in one["timestamps"]] for one in traces if "timestamps" in one]
    assert "COMPUTE_END" in names[0]
