"""One request as it travels, and whether a server's answer to it is right."""

from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import onnxruntime
from tests.benchmarks.harness import CACHE, BenchError, step
from tests.benchmarks.inference.models import Model

from penstock.oip import inference_pb2

SERVICE, METHOD = "inference.GRPCInferenceService", "ModelInfer"
PATH = f"/{SERVICE}/{METHOD}"
UNLIMITED = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]

DATATYPES = {"float32": "FP32", "int64": "INT64"}


@dataclass(frozen=True)
class Request:
    """One row as a gRPC message, the file that h2load posts, and what bare ONNX Runtime answers."""

    message: bytes
    frame: Path
    expected: dict[str, np.ndarray]


def request(model: Model) -> Request:
    step(f"{model.name}: what bare ONNX Runtime answers")
    message = inference_pb2.ModelInferRequest(model_name=model.name)
    for name, array in model.row.items():
        message.inputs.add(name=name, datatype=DATATYPES[str(array.dtype)], shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    content = message.SerializeToString()
    frame = CACHE / f"{model.name}.request"
    frame.write_bytes(b"\0" + len(content).to_bytes(4, "big") + content)
    session = onnxruntime.InferenceSession(model.path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return Request(content, frame, dict(zip(names, session.run(names, model.row), strict=True)))


def call(address: str, path: str, message: bytes, timeout_s: float = 60) -> bytes:
    with grpc.insecure_channel(address, options=UNLIMITED) as channel:
        return channel.unary_unary(path)(message, timeout=timeout_s, wait_for_ready=True)


def answer_size(address: str, asked: Request) -> int:
    """The bytes of a server's whole answer, gRPC's prefix included.

    Raises `BenchError` where it is an error, or another answer than bare ONNX Runtime's.
    """
    try:
        content = call(address, PATH, asked.message)
    except grpc.RpcError as error:
        raise BenchError(f"The server refused the request: {error.code().name}: {error.details()}") from error
    answer = inference_pb2.ModelInferResponse.FromString(content)
    arrays = {}
    for position, output in enumerate(answer.outputs):
        expected = asked.expected[output.name]
        raw = answer.raw_output_contents[position] if answer.raw_output_contents else None
        arrays[output.name] = (
            np.frombuffer(raw, expected.dtype)
            if raw is not None
            else np.asarray(output.contents.fp32_contents or output.contents.int64_contents, expected.dtype)
        )
    if arrays.keys() != asked.expected.keys():
        raise BenchError(f"The answer has the outputs {sorted(arrays)}, not {sorted(asked.expected)}.")
    for name, expected in asked.expected.items():
        if not np.allclose(arrays[name].ravel(), expected.ravel(), rtol=1e-3, atol=1e-4):
            raise BenchError(f"The output {name} is not what bare ONNX Runtime answers.")
    return 5 + len(content)
