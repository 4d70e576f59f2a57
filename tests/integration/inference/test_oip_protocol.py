"""The Open Inference Protocol through the wire: what clients get, and what every wrong request is told."""

import asyncio
from collections.abc import AsyncIterator, Callable

import grpc
import numpy as np
import pytest
import pytest_asyncio
from tests.integration.inference import graphs
from tests.integration.inference.fleet import Inference, Registry, infer_request, inference_server

from penstock.oip import inference_pb2 as pb
from penstock.oip.inference_pb2_grpc import GRPCInferenceServiceStub

pytestmark = pytest.mark.asyncio(loop_scope="module")

MAX_BATCH = 8
ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)
NUMERIC = [name for name in graphs.DATATYPES if name not in ("BYTES", "BF16")]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory, transport: str) -> AsyncIterator[Inference]:
    """One server with every model of this module; its models never change."""
    registry = Registry(tmp_path_factory.mktemp("registry"))
    bundles = {
        "scale": graphs.scale(2),
        "pair": graphs.pair(),
        "difference": graphs.pair("Sub"),
        "lookup": graphs.lookup(),
        "words": graphs.identity("BYTES", ["batch", 2]),
        "scalar": graphs.identity("FP64", []),
        "broken": graphs.Bundle({"model.onnx": b"\x0a\x03abc"}, graphs.scale(1).signature),
        **{f"same-{name.lower()}": graphs.identity(name, ["n", 3]) for name in NUMERIC},
    }
    targets = {name: [(await registry.add(name, 1, bundle), 100)] for name, bundle in bundles.items()}
    targets["scale"] = [(await registry.add("scale", 3, graphs.scale(2)), 100)]
    await registry.deploy(**targets)
    home = tmp_path_factory.mktemp("home")
    async with (
        registry.running() as port,
        inference_server(home, port, transport, max_batch_size=MAX_BATCH, server_name="triton") as inference,
    ):
        await inference.settled()
        yield inference


@pytest.fixture(scope="module")
def oip(server: Inference) -> GRPCInferenceServiceStub:
    return server.oip


async def test_all_outputs_come_raw_in_the_models_order_and_the_id_is_echoed(oip: GRPCInferenceServiceStub) -> None:
    request = infer_request("scale", {"rows": ROWS})
    request.id = "mine"
    response = await oip.ModelInfer(request)
    assert (response.model_name, response.model_version, response.id) == ("scale", "3", "mine")
    assert [(one.name, one.datatype, list(one.shape)) for one in response.outputs] == [
        ("scaled", "FP32", [2, 4]),
        ("total", "FP32", [2, 1]),
    ]
    assert response.raw_output_contents[0] == (ROWS * 2).tobytes()
    assert response.raw_output_contents[1] == (ROWS * 2).sum(1, keepdims=True).tobytes()
    assert not any(one.HasField("contents") for one in response.outputs)


async def test_requested_outputs_come_in_the_requested_order(oip: GRPCInferenceServiceStub) -> None:
    response = await oip.ModelInfer(infer_request("scale", {"rows": ROWS}, outputs=("total", "scaled")))
    assert [one.name for one in response.outputs] == ["total", "scaled"]
    assert [len(raw) for raw in response.raw_output_contents] == [8, 32]


@pytest.mark.parametrize("datatype", NUMERIC)
@pytest.mark.parametrize("rows", [0, 2])
async def test_every_datatype_travels_raw(oip: GRPCInferenceServiceStub, datatype: str, rows: int) -> None:
    request = pb.ModelInferRequest(model_name=f"same-{datatype.lower()}")
    request.inputs.add(name="given", datatype=datatype, shape=[rows, 3])
    item_bytes = {"BOOL": 1, "FP16": 2, "FP32": 4, "FP64": 8}.get(datatype) or int(datatype.lstrip("UINT")) // 8
    request.raw_input_contents.append(bytes(index % 2 for index in range(rows * 3 * item_bytes)))
    response = await oip.ModelInfer(request)
    assert response.raw_output_contents[0] == request.raw_input_contents[0]
    assert list(response.outputs[0].shape) == [rows, 3]


@pytest.mark.parametrize(
    ("datatype", "contents", "expected"),
    [
        ("BOOL", {"bool_contents": [True, False, True]}, np.array([1, 0, 1], np.bool_)),
        ("INT8", {"int_contents": [-128, 0, 127]}, np.array([-128, 0, 127], np.int8)),
        ("INT64", {"int64_contents": [-(2**63), 0, 2**63 - 1]}, np.array([-(2**63), 0, 2**63 - 1], np.int64)),
        ("UINT16", {"uint_contents": [0, 1, 65535]}, np.array([0, 1, 65535], np.uint16)),
        ("UINT64", {"uint64_contents": [0, 1, 2**64 - 1]}, np.array([0, 1, 2**64 - 1], np.uint64)),
        ("FP32", {"fp32_contents": [0.5, -1, 3e38]}, np.array([0.5, -1, 3e38], np.float32)),
        ("FP64", {"fp64_contents": [0.5, -1, 1e300]}, np.array([0.5, -1, 1e300], np.float64)),
    ],
)
async def test_typed_contents_are_answered_raw(
    oip: GRPCInferenceServiceStub, datatype: str, contents: dict[str, list[float]], expected: np.ndarray
) -> None:
    request = pb.ModelInferRequest(model_name=f"same-{datatype.lower()}")
    request.inputs.add(name="given", datatype=datatype, shape=[1, 3], contents=pb.InferTensorContents(**contents))
    assert (await oip.ModelInfer(request)).raw_output_contents[0] == expected.tobytes()


async def test_inputs_come_in_any_order(oip: GRPCInferenceServiceStub) -> None:
    left, right = np.array([[1, 2, 3]], np.int32), np.array([[10, 20, 30]], np.int32)
    for inputs in ({"left": left, "right": right}, {"right": right, "left": left}):
        request = infer_request("difference", inputs)
        assert (await oip.ModelInfer(request)).raw_output_contents[0] == (left - right).tobytes()


async def test_strings_travel_typed_and_raw(oip: GRPCInferenceServiceStub) -> None:
    words = ["", "naïve\0text"]
    raw = b"".join(len(word.encode()).to_bytes(4, "little") + word.encode() for word in words)
    typed = pb.ModelInferRequest(model_name="words")
    typed.inputs.add(name="given", datatype="BYTES", shape=[1, 2]).contents.bytes_contents.extend(
        word.encode() for word in words
    )
    as_raw = pb.ModelInferRequest(model_name="words", raw_input_contents=[raw])
    as_raw.inputs.add(name="given", datatype="BYTES", shape=[1, 2])
    assert (await oip.ModelInfer(typed)).raw_output_contents[0] == raw
    assert (await oip.ModelInfer(as_raw)).raw_output_contents[0] == raw


async def test_a_scalar_has_no_axes(oip: GRPCInferenceServiceStub) -> None:
    response = await oip.ModelInfer(_raw("scalar", "FP64", [], np.float64(1.5).tobytes()))
    assert list(response.outputs[0].shape) == []
    assert response.raw_output_contents[0] == np.float64(1.5).tobytes()


def _raw(model: str, datatype: str, shape: list[int], data: bytes, name: str = "given") -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model, raw_input_contents=[data])
    request.inputs.add(name=name, datatype=datatype, shape=shape)
    return request


def _typed(model: str, datatype: str, shape: list[int], **contents: list[object]) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=model)
    tensor = request.inputs.add(name="given", datatype=datatype, shape=shape)
    for name, values in contents.items():
        getattr(tensor.contents, name).extend(values)
    return request


def _rows(*shape: int, size: int = 4) -> pb.ModelInferRequest:
    """A request to `scale` with a shape and so many bytes an element of the right shape."""
    return _raw("scale", "FP32", list(shape), bytes(size), "rows")


def _changed(change: Callable[[pb.ModelInferRequest], object]) -> pb.ModelInferRequest:
    request = infer_request("scale", {"rows": ROWS})
    change(request)
    return request


def _pair(left: tuple[int, int], right: tuple[int, int]) -> pb.ModelInferRequest:
    return infer_request("pair", {"left": np.zeros(left, np.int32), "right": np.zeros(right, np.int32)})


def _string(data: bytes) -> pb.ModelInferRequest:
    return _raw("words", "BYTES", [1, 2], data)


INVALID = {
    "typed beside raw": (
        _changed(lambda request: request.inputs[0].contents.fp32_contents.append(1)),
        "inputs[0].contents",
        "expected none beside raw_input_contents",
    ),
    "wrong typed list": (
        _typed("same-fp32", "FP32", [1, 3], fp64_contents=[1, 2, 3]),
        "inputs[0].contents",
        "expected FP32 in fp32_contents; got fp64_contents",
    ),
    "two typed lists": (
        _typed("same-int8", "INT8", [1, 3], int_contents=[1, 2, 3], bool_contents=[True]),
        "inputs[0].contents",
        "got bool_contents",
    ),
    "typed FP16": (
        _typed("same-fp16", "FP16", [1, 3], fp32_contents=[1, 2, 3]),
        "inputs[0].contents",
        "FP16 has no typed contents",
    ),
    "too few typed elements": (
        _typed("same-int64", "INT64", [2, 3], int64_contents=[1, 2, 3]),
        "inputs[0].contents",
        "expected 6 elements for INT64 [2, 3]; got 3",
    ),
    "typed element out of range": (
        _typed("same-int8", "INT8", [1, 3], int_contents=[1, 2, 128]),
        "inputs[0].contents",
        "from -128 to 127; got 128",
    ),
    "no data": (_typed("same-fp32", "FP32", [1, 3]), "inputs[0].contents", "no data came"),
    "empty contents": (
        _typed("same-fp32", "FP32", [1, 3], fp32_contents=[]),
        "inputs[0].contents",
        "expected 3 elements for FP32 [1, 3]; got 0",
    ),
    "duplicate input": (
        _changed(lambda request: (request.inputs.append(request.inputs[0]), request.raw_input_contents.append(b""))),
        "inputs[1].name",
        "input 'rows' came twice",
    ),
    "unknown input": (
        _changed(lambda request: setattr(request.inputs[0], "name", "row")),
        "inputs[0].name",
        "no input 'row'; expected 'rows: FP32 [batch, 4]'",
    ),
    "unknown output": (
        _changed(lambda request: request.outputs.add(name="sum")),
        "outputs[0].name",
        "no output 'sum'; expected 'scaled: FP32 [batch, 4]', 'total: FP32 [batch, 1]'",
    ),
    "duplicate output": (
        _changed(lambda request: [request.outputs.add(name="total") for _ in range(2)]),
        "outputs[1].name",
        "output 'total' was asked for twice",
    ),
    "missing input": (
        infer_request("pair", {"left": np.zeros((1, 2), np.int32)}),
        "inputs",
        "input 'right' is missing",
    ),
    "no input": (pb.ModelInferRequest(model_name="scale"), "inputs", "input 'rows' is missing"),
    "wrong datatype": (
        _raw("scale", "FP64", [1, 4], bytes(32), "rows"),
        "inputs[0].datatype",
        "expected FP32; got 'FP64'",
    ),
    "no datatype": (_raw("scale", "", [1, 4], bytes(16), "rows"), "inputs[0].datatype", "expected FP32; got ''"),
    "wrong axis": (_rows(1, 3), "inputs[0].shape", "expected [batch, 4]; got [1, 3]"),
    "wrong rank": (_rows(4), "inputs[0].shape", "expected [batch, 4]; got [4]"),
    "a thousand axes": (
        _rows(*[1] * 1000),
        "inputs[0].shape",
        "got [1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, …]",
    ),
    "negative axis": (_rows(-1, 4), "inputs[0].shape", "expected [batch, 4]; got [-1, 4]"),
    "negative axis without bytes": (_rows(-(2**63), 4, size=0), "inputs[0].shape", "got [-9223372036854775808, 4]"),
    "overflowing shape": (
        _rows(2**62, 4, size=0),
        "raw_input_contents[0]",
        "expected 73786976294838206464 bytes for FP32 [4611686018427387904, 4]; got 0",
    ),
    "huge shape": (_rows(2**40, 4, size=16), "raw_input_contents[0]", "got 16"),
    "huge empty shape": (
        infer_request("pair", {"left": np.zeros((0, 1), np.int32), "right": np.zeros((0, 1), np.int32)}),
        "raw_input_contents[0]",
        "expected the axes of an empty tensor to span at most 16777216; got [0, 1099511627776]",
    ),
    "huge string shape": (
        _raw("words", "BYTES", [2**61, 2], b""),
        "raw_input_contents[0]",
        "expected 4611686018427387904 BYTES elements",
    ),
    "too few bytes": (_rows(1, 4, size=15), "raw_input_contents[0]", "expected 16 bytes for FP32 [1, 4]; got 15"),
    "too many bytes": (_rows(1, 4, size=20), "raw_input_contents[0]", "expected 16 bytes for FP32 [1, 4]; got 20"),
    "too few raw entries": (
        _changed(lambda request: request.inputs.append(request.inputs[0])),
        "raw_input_contents",
        "expected 2 entries, one for each input that is not in shared memory; got 1",
    ),
    "BOOL of two": (_raw("same-bool", "BOOL", [1, 3], b"\0\1\2"), "raw_input_contents[0]", "got 2"),
    "BYTES cut in a length": (
        _string(b"\5\0\0\0hello\1\0\0"),
        "raw_input_contents[0]",
        "the data ends before the length of element 1",
    ),
    "BYTES cut in an element": (
        _string(b"\0\0\0\0\5\0\0\0hell"),
        "raw_input_contents[0]",
        "BYTES element 1 claims 5 bytes; the data has 4 more",
    ),
    "BYTES with a giant length": (
        _string(b"\xff\xff\xff\xff\0\0\0\0"),
        "raw_input_contents[0]",
        "element 0 claims 4294967295 bytes",
    ),
    "BYTES with more than its elements": (
        _string(b"\0\0\0\0\0\0\0\0more"),
        "raw_input_contents[0]",
        "expected 2 BYTES elements in 8 bytes; got 12 bytes",
    ),
    "BYTES that are no text": (
        _string(b"\0\0\0\0\1\0\0\0\xff"),
        "raw_input_contents[0]",
        "BYTES element 1 is not UTF-8",
    ),
    "batch above the maximum": (
        _rows(MAX_BATCH + 1, 4, size=16 * (MAX_BATCH + 1)),
        "inputs[0].shape",
        "expected at most 8 rows ('batch'); got 9",
    ),
    "batches that differ": (
        _pair((2, 3), (1, 3)),
        "inputs[1].shape",
        "expected axis 'batch' to be 2 as in 'left'; got 1",
    ),
    "dynamic axes that differ": (
        _pair((2, 3), (2, 4)),
        "inputs[1].shape",
        "expected axis 'sequence' to be 3 as in 'left'; got 4",
    ),
    "reserved parameter": (
        _changed(lambda request: setattr(request.parameters["triton_x"], "bool_param", True)),
        "parameters[triton_x]",
        "keys that begin with 'triton_' are reserved",
    ),
    "timeout that is no number": (
        _changed(lambda request: setattr(request.parameters["timeout"], "string_param", "1")),
        "parameters[timeout]",
        "expected microseconds",
    ),
    "version that is no number": (
        _changed(lambda request: setattr(request, "model_version", "latest")),
        "model_version",
        "got 'latest'",
    ),
}
for _tensor in INVALID["huge empty shape"][0].inputs:
    _tensor.shape[1] = 2**40


@pytest.mark.parametrize("case", INVALID)
async def test_a_wrong_request_is_told_what_is_wrong(oip: GRPCInferenceServiceStub, case: str) -> None:
    request, field, text = INVALID[case]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await oip.ModelInfer(request)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    details = caught.value.details() or ""
    assert details.startswith(f"{field}: ")
    assert text in details
    if not field.startswith(("parameters", "model_version")):
        assert f"Model {request.model_name!r} version {3 if request.model_name == 'scale' else 1}" in details
    assert (await oip.ModelInfer(infer_request("scale", {"rows": ROWS}))).outputs, "the server goes on"


async def test_shared_memory_is_off_unless_the_operator_says_so(oip: GRPCInferenceServiceStub) -> None:
    request = infer_request("scale", {"rows": ROWS})
    del request.raw_input_contents[:]
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    request.inputs[0].parameters["shared_memory_byte_size"].int64_param = 32
    for call in (oip.ModelInfer(request), oip.SystemSharedMemoryStatus(pb.SystemSharedMemoryStatusRequest())):
        with pytest.raises(grpc.aio.AioRpcError, match="--allow-client-shm") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.parametrize("timeout_us", [0, 10_000_000])
async def test_the_callers_own_parameters_pass(oip: GRPCInferenceServiceStub, timeout_us: int) -> None:
    request = infer_request("scale", {"rows": ROWS})
    request.parameters["trace"].string_param = "abc"
    request.parameters["timeout"].int64_param = timeout_us
    assert len((await oip.ModelInfer(request)).outputs) == 2


@pytest.mark.parametrize(
    ("model", "version"), [("nobody", ""), ("nobody", "1"), ("scale", "1"), ("scale", "77"), ("", "")]
)
async def test_an_unknown_model_or_version_is_not_found(
    oip: GRPCInferenceServiceStub, model: str, version: str
) -> None:
    for call in (
        oip.ModelInfer(pb.ModelInferRequest(model_name=model, model_version=version)),
        oip.ModelMetadata(pb.ModelMetadataRequest(name=model, version=version)),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="Request for unknown model") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert not (await oip.ModelReady(pb.ModelReadyRequest(name=model, version=version))).ready


@pytest.mark.parametrize("version", ["latest", "0", "-1", "1.0"])
async def test_a_version_that_is_no_number_is_refused_whoever_asks(oip: GRPCInferenceServiceStub, version: str) -> None:
    for call in (
        oip.ModelReady(pb.ModelReadyRequest(name="scale", version=version)),
        oip.ModelMetadata(pb.ModelMetadataRequest(name="scale", version=version)),
    ):
        with pytest.raises(grpc.aio.AioRpcError, match="expected a version's number") as caught:
            await call
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_the_index_lists_all_versions_or_the_ready_ones(oip: GRPCInferenceServiceStub) -> None:
    everything = (await oip.RepositoryIndex(pb.RepositoryIndexRequest())).models
    ready = (await oip.RepositoryIndex(pb.RepositoryIndexRequest(ready=True))).models
    assert {one.name for one in everything} - {one.name for one in ready} == {"broken"}
    assert [(one.version, one.state, one.reason) for one in ready if one.name == "scale"] == [("3", "READY", "")]
    with pytest.raises(grpc.aio.AioRpcError, match="There is no repository 'other'"):
        await oip.RepositoryIndex(pb.RepositoryIndexRequest(repository_name="other"))


async def test_served_versions_are_listed_by_model_and_number(server: Inference) -> None:
    everything = await server.served()
    names = [(one.model, one.version) for one in everything]
    assert names == sorted(names)
    assert {"broken", "pair", "scale"} <= {model for model, _ in names}
    (scale,) = await server.served("scale")
    assert scale in everything
    assert (scale.version, scale.weight, scale.message) == (3, 100, "")
    assert scale.bundle_digest.startswith("sha256:")
    assert scale.update_time.seconds > 0
    (broken,) = await server.served("broken")
    assert "cannot open model.onnx" in broken.message
    assert await server.served("nobody") == []


async def test_one_bad_row_fails_alone(oip: GRPCInferenceServiceStub) -> None:
    """The requests come together, so some share a batch with the row that makes the run fail."""
    indices = [3, 99, 7, 0, 99, 5]
    requests = [infer_request("lookup", {"index": np.array([index], np.int64)}) for index in indices]
    answers = await asyncio.gather(*(oip.ModelInfer(request) for request in requests), return_exceptions=True)
    for index, answer in zip(indices, answers, strict=True):
        if index < 10:
            assert answer.raw_output_contents[0] == np.int64(index * 10).tobytes()
        else:
            assert answer.code() is grpc.StatusCode.INTERNAL
            assert "The model could not compute these inputs" in answer.details()


async def test_each_answer_belongs_to_its_request(oip: GRPCInferenceServiceStub) -> None:
    rng = np.random.default_rng(7)

    async def ask(rows: int) -> None:
        given = rng.random((rows, 4), np.float32)
        response = await oip.ModelInfer(infer_request("scale", {"rows": given}, outputs=("scaled",)))
        assert response.raw_output_contents[0] == (given * 2).tobytes()

    await asyncio.gather(*(ask(int(rows)) for rows in rng.integers(0, MAX_BATCH + 1, 200)))
