"""What the contract forbids: the code, and the field that is named."""

from collections.abc import AsyncIterator

import grpc
import pytest
import pytest_asyncio
from google.protobuf.message import Message
from tests.integration.registry.registries import GRAPH, Registry, blob_of, described, refusal, served

from penstock.api.registry.v1 import artifact_service_pb2, deployment_service_pb2
from penstock.api.registry.v1 import registry_service_pb2 as pb
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.api.types.v1.parity_pb2 import DatatypeTolerance, ParityCase, ParityReport
from penstock.api.types.v1.signature_pb2 import Dimension, Signature, TensorSpec

pytestmark = pytest.mark.asyncio(loop_scope="module")

GOOD = TensorSpec(name="x", datatype="FP32", shape=[Dimension(name="batch")])
BLOB = blob_of(GRAPH)
LONG = "x" * 1001


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def running(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Registry]:
    async with served(tmp_path_factory.mktemp("home")) as registry:
        await registry.model(versions=1)
        yield registry


def version(**fields: object) -> pb.CreateVersionRequest:
    return pb.CreateVersionRequest(version=described(**fields))


def files(**others: Blob) -> pb.CreateVersionRequest:
    return version(files={"model.onnx": BLOB, **others})


def signature(*inputs: TensorSpec, outputs: tuple[TensorSpec, ...] = (GOOD,)) -> pb.CreateVersionRequest:
    return version(signature=Signature(inputs=inputs, outputs=outputs))


def parity(*cases: ParityCase, **totals: object) -> pb.CreateVersionRequest:
    return version(parity=ParityReport(cases=cases or [case()], **totals))


def case(**fields: object) -> ParityCase:
    return ParityCase(**{"output": "digit", "batch_size": 1, **fields})


def deployment(*targets: dict[str, object], model: str = "digits") -> deployment_service_pb2.SetDeploymentRequest:
    return deployment_service_pb2.SetDeploymentRequest(deployment={"model": model, "targets": targets})


REQUESTS: list[tuple[str, Message, list[str]]] = [
    ("CreateModel", pb.CreateModelRequest(), ["model.name"]),
    ("CreateModel", pb.CreateModelRequest(model={"name": "Digits"}), ["model.name"]),
    ("CreateModel", pb.CreateModelRequest(model={"name": "-digits"}), ["model.name"]),
    ("CreateModel", pb.CreateModelRequest(model={"name": "../etc"}), ["model.name"]),
    ("CreateModel", pb.CreateModelRequest(model={"name": "d" * 64}), ["model.name"]),
    ("CreateModel", pb.CreateModelRequest(model={"name": "d\n"}), ["model.name"]),
    ("CreateModel", pb.CreateModelRequest(model={"name": "d", "description": LONG}), ["model.description"]),
    ("GetModel", pb.GetModelRequest(name=""), ["name"]),
    ("ListModels", pb.ListModelsRequest(page_size=1001), ["page_size"]),
    ("ListModels", pb.ListModelsRequest(page_size=-1), ["page_size"]),
    ("ListModels", pb.ListModelsRequest(page_token="no token"), ["page_token"]),
    ("ListModels", pb.ListModelsRequest(page_token="Li4v"), ["page_token"]),
    ("DeleteModel", pb.DeleteModelRequest(name="A"), ["name"]),
    (
        "CreateVersion",
        pb.CreateVersionRequest(),
        ["version.model", "version.files", "version.signature.inputs", "version.signature.outputs"],
    ),
    ("CreateVersion", pb.CreateVersionRequest(version=described(), request_id="a b"), ["request_id"]),
    ("CreateVersion", pb.CreateVersionRequest(version=described(), request_id="a" * 65), ["request_id"]),
    ("CreateVersion", version(model="A"), ["version.model"]),
    ("CreateVersion", version(files={"other.onnx": BLOB}), ["version.files"]),
    ("CreateVersion", files(**{str(number): BLOB for number in range(100)}), ["version.files"]),
    ("CreateVersion", files(**{"manifest.json": BLOB}), ['version.files["manifest.json"]']),
    ("CreateVersion", files(**{"../x": BLOB}), ['version.files["../x"]']),
    ("CreateVersion", files(**{".x": BLOB}), ['version.files[".x"]']),
    ("CreateVersion", files(**{"": BLOB}), ['version.files[""]']),
    ("CreateVersion", files(**{"a" * 201: BLOB}), [f'version.files["{"a" * 80}"]']),
    ("CreateVersion", files(x=Blob(digest="sha256:AB", size_bytes=1)), ['version.files["x"].digest']),
    ("CreateVersion", files(x=Blob(digest=BLOB.digest, size_bytes=-1)), ['version.files["x"].size_bytes']),
    ("CreateVersion", files(x=Blob(digest=BLOB.digest, size_bytes=2**40)), ['version.files["x"].size_bytes']),
    ("CreateVersion", signature(), ["version.signature.inputs"]),
    ("CreateVersion", signature(GOOD, outputs=()), ["version.signature.outputs"]),
    ("CreateVersion", signature(GOOD, GOOD), ["version.signature.inputs[1].name"]),
    ("CreateVersion", signature(GOOD, outputs=(GOOD, GOOD)), ["version.signature.outputs[1].name"]),
    ("CreateVersion", signature(TensorSpec(datatype="FP32")), ["version.signature.inputs[0].name"]),
    ("CreateVersion", signature(TensorSpec(name="x", datatype="float")), ["version.signature.inputs[0].datatype"]),
    (
        "CreateVersion",
        signature(GOOD, TensorSpec(name="y", datatype="FP32", shape=[Dimension(size=1), Dimension()])),
        ["version.signature.inputs[1].shape[1]"],
    ),
    (
        "CreateVersion",
        signature(TensorSpec(name="y", datatype="FP32", shape=[Dimension(size=-1)])),
        ["version.signature.inputs[0].shape[0]"],
    ),
    (
        "CreateVersion",
        signature(TensorSpec(name="y", datatype="FP32", shape=[Dimension(name="")])),
        ["version.signature.inputs[0].shape[0]"],
    ),
    ("CreateVersion", version(parity=ParityReport()), ["version.parity.cases"]),
    ("CreateVersion", parity(max_absolute_error=float("nan")), ["version.parity.max_absolute_error"]),
    ("CreateVersion", parity(relative_tolerance=float("inf")), ["version.parity.relative_tolerance"]),
    ("CreateVersion", parity(argmax_agreement=1.5), ["version.parity.argmax_agreement"]),
    ("CreateVersion", parity(row_count=-1), ["version.parity.row_count"]),
    (
        "CreateVersion",
        parity(tolerances=[DatatypeTolerance(absolute=-1.0, relative=float("nan"))]),
        ["version.parity.tolerances[0].absolute", "version.parity.tolerances[0].relative"],
    ),
    ("CreateVersion", parity(case(), case(output="other")), ["version.parity.cases[1].output"]),
    ("CreateVersion", parity(case(batch_size=-1)), ["version.parity.cases[0].batch_size"]),
    ("CreateVersion", parity(case(max_relative_error=-1.0)), ["version.parity.cases[0].max_relative_error"]),
    ("CreateVersion", parity(case(argmax_agreement=1.5)), ["version.parity.cases[0].argmax_agreement"]),
    ("CreateVersion", parity(variants={"chosen": "int8"}), ["version.parity.variants.chosen"]),
    (
        "CreateVersion",
        parity(variants={"chosen": "int8", "variants": [{"name": "int8", "measurement": {}, "dropped": "slower"}]}),
        ["version.parity.variants.chosen"],
    ),
    (
        "CreateVersion",
        parity(
            variants={
                "chosen": "fp32",
                "variants": [
                    {"name": "fp32", "measurement": {"errors": [{"output": "x", "mean_absolute_error": float("nan")}]}}
                ],
            }
        ),
        [
            "version.parity.variants.variants[0].measurement.errors[0].output",
            "version.parity.variants.variants[0].measurement.errors[0].mean_absolute_error",
        ],
    ),
    ("CreateVersion", version(metrics={str(number): 0.0 for number in range(101)}), ["version.metrics"]),
    ("CreateVersion", version(metrics={"": 0.0}), ["version.metrics"]),
    ("CreateVersion", version(labels=["l"] * 10_001), ["version.labels"]),
    ("CreateVersion", version(provenance={"job_id": LONG}), ["version.provenance.job_id"]),
    ("CreateVersion", version(provenance={"dataset": LONG}), ["version.provenance.dataset"]),
    ("CreateVersion", version(provenance={"dataset_digest": "md5:1"}), ["version.provenance.dataset_digest"]),
    ("CreateVersion", version(description=LONG), ["version.description"]),
    ("CreateVersion", version(labels=["l" * 1024 * 1024]), ["version"]),
    ("GetVersion", pb.GetVersionRequest(), ["model"]),
    ("GetVersion", pb.GetVersionRequest(model="digits", number=0), ["number"]),
    ("GetVersion", pb.GetVersionRequest(model="digits", alias="1"), ["alias"]),
    ("GetVersion", pb.GetVersionRequest(model="digits", alias=""), ["alias"]),
    ("ListVersions", pb.ListVersionsRequest(model="", page_size=1001), ["model", "page_size"]),
    ("ListVersions", pb.ListVersionsRequest(model="digits", page_token="YWI="), ["page_token"]),
    ("ListVersions", pb.ListVersionsRequest(model="digits", page_token="LTE="), ["page_token"]),
    ("ListVersions", pb.ListVersionsRequest(model="digits", page_token="9" * 40), ["page_token"]),
    ("DeleteVersion", pb.DeleteVersionRequest(model="digits"), ["number"]),
    ("SetAlias", pb.SetAliasRequest(), ["model", "alias", "version"]),
    ("SetAlias", pb.SetAliasRequest(model="digits", alias="12", version=1), ["alias"]),
    ("SetAlias", pb.SetAliasRequest(model="digits", alias="A", version=1), ["alias"]),
    ("SetAlias", pb.SetAliasRequest(model="digits", alias="a", version=-1), ["version"]),
    ("SetAlias", pb.SetAliasRequest(model="digits", alias="a", version=1, expected_version=-1), ["expected_version"]),
    ("SetAlias", pb.SetAliasRequest(model="digits", alias="a", version=1, reason=LONG), ["reason"]),
    ("ListAliases", pb.ListAliasesRequest(), ["model"]),
    ("ListAliasMoves", pb.ListAliasMovesRequest(page_size=-1), ["model", "alias", "page_size"]),
    ("ListAliasMoves", pb.ListAliasMovesRequest(model="digits", alias="a", page_token="?"), ["page_token"]),
    ("DeleteAlias", pb.DeleteAliasRequest(model="digits", alias="a", reason=LONG), ["reason"]),
    ("DeleteAlias", pb.DeleteAliasRequest(), ["model", "alias"]),
    (
        "SetDeployment",
        deployment_service_pb2.SetDeploymentRequest(),
        ["deployment.model", "deployment.targets", "deployment.targets"],
    ),
    ("SetDeployment", deployment({"version": 1, "weight": 99}), ["deployment.targets"]),
    ("SetDeployment", deployment({"version": 1, "weight": 100}, {"version": 1}), ["deployment.targets[1].weight"]),
    (
        "SetDeployment",
        deployment({"version": 1, "weight": 101}, {"version": 1, "weight": -1}),
        ["deployment.targets[0].weight", "deployment.targets[1].weight"],
    ),
    (
        "SetDeployment",
        deployment(*[{"version": 1, "weight": 9}] * 10, {"version": 1, "weight": 10}),
        ["deployment.targets"],
    ),
    ("SetDeployment", deployment({"weight": 100}), ["deployment.targets[0]"]),
    ("SetDeployment", deployment({"version": 0, "weight": 100}), ["deployment.targets[0].version"]),
    ("SetDeployment", deployment({"alias": "7", "weight": 100}), ["deployment.targets[0].alias"]),
    ("GetDeployment", deployment_service_pb2.GetDeploymentRequest(), ["model"]),
    (
        "ListDeployments",
        deployment_service_pb2.ListDeploymentsRequest(page_size=1001, page_token="!"),
        ["page_size", "page_token"],
    ),
    ("DeleteDeployment", deployment_service_pb2.DeleteDeploymentRequest(model="A"), ["model"]),
    ("QueryWriteStatus", artifact_service_pb2.QueryWriteStatusRequest(digest="../x"), ["digest"]),
]


@pytest.mark.parametrize(
    ("method", "request_", "fields"), REQUESTS, ids=[f"{method}-{'+'.join(fields)}" for method, _, fields in REQUESTS]
)
async def test_names_the_field(running: Registry, method: str, request_: Message, fields: list[str]) -> None:
    stubs = (running.models, running.deployments, running.artifacts)
    call = next(getattr(stub, method) for stub in stubs if hasattr(stub, method))

    code, text, found = await refusal(call(request_))

    assert (code, found) == (grpc.StatusCode.INVALID_ARGUMENT, fields)
    assert "expected" in text or "leave it out" in text or "twice" in text
