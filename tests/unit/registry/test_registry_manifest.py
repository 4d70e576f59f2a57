"""The manifest's bytes name the content of a bundle, so they must never change by themselves."""

from hypothesis import given
from hypothesis import strategies as st

from penstock.api.registry.v1.model_pb2 import Version
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.api.types.v1.parity_pb2 import ParityReport
from penstock.api.types.v1.signature_pb2 import Dimension, Signature, TensorSpec
from penstock.registry.manifest import manifest_of
from penstock.storage.blobs import digest_of


def version(**fields: object) -> Version:
    signature = Signature(
        inputs=[TensorSpec(name="x", datatype="FP32", shape=[Dimension(name="batch"), Dimension(size=0)])],
        outputs=[TensorSpec(name="y", datatype="BYTES")],
    )
    files = {"model.onnx": Blob(digest=digest_of(b""), size_bytes=0)}
    return Version(**{"files": files, "signature": signature, **fields})  # type: ignore[arg-type]  # any field


def test_known_bytes() -> None:
    digest = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert manifest_of(
        version(labels=["é"], parity=ParityReport(max_absolute_error=1e-7, source="keras"))
    ).decode() == (
        '{"files":{"model.onnx":{"digest":"' + digest + '","size_bytes":0}},"format":1,'
        '"inputs":[{"datatype":"FP32","name":"x","shape":["batch",0]}],"labels":["é"],'
        '"outputs":[{"datatype":"BYTES","name":"y","shape":[]}],'
        '"parity":{"absolute_tolerance":0.0,"max_absolute_error":1e-07,"max_relative_error":0.0,'
        '"relative_tolerance":0.0,"runtime":"","source":"keras"}}'
    )


def test_a_variant_is_part_of_the_content() -> None:
    errors = [{"output": "y", "relative_error": 0.5, "argmax_agreement": 1.0}]
    measured = [{"name": name, "measurement": {"errors": errors, "row_latency_us": 7.0}} for name in ("fp32", "int8")]
    plain, chosen, other = (
        manifest_of(version(parity=ParityReport(variants={"variants": tried, "chosen": name}))).decode()
        for tried, name in (([], ""), (measured, "int8"), (measured, "fp32"))
    )
    assert '"variant":{"errors":{"y":{"argmax_agreement":1.0,"relative_error":0.5}},"name":"int8"}' in chosen
    assert plain == other == manifest_of(version(parity=ParityReport())).decode()


@given(st.permutations(["a", "b.json", "model.onnx", "weights_1"]))
def test_the_order_of_files_does_not_count(names: list[str]) -> None:
    blobs = {name: Blob(digest=digest_of(name.encode()), size_bytes=len(name)) for name in names}

    assert manifest_of(version(files=blobs)) == manifest_of(version(files=dict(sorted(blobs.items()))))


def test_what_belongs_to_one_registration_does_not_count() -> None:
    described = version(model="m", number=7, metrics={"a": 1.0}, description="d", provenance={"job_id": "j"})

    assert manifest_of(described) == manifest_of(version())
    assert manifest_of(version(labels=["a"])) != manifest_of(version())
