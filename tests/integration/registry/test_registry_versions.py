"""Versions and their blobs, through the wire."""

import asyncio
import json
import math
from pathlib import Path

import grpc
from tests.integration.registry.registries import GRAPH, Registry, blob_of, described, refusal, served

from penstock.api.registry.v1 import artifact_service_pb2
from penstock.api.registry.v1 import registry_service_pb2 as pb
from penstock.api.types.v1.blob_pb2 import Blob
from penstock.api.types.v1.parity_pb2 import ParityCase, ParityReport

PARITY = ParityReport(
    cases=[ParityCase(output="digit", rows="sample", batch_size=7, argmax_agreement=1.0)],
    max_absolute_error=2e-7,
    absolute_tolerance=1e-5,
    source="keras",
    runtime="onnxruntime",
)


async def get(registry: Registry, **selector: object) -> pb.GetVersionResponse:
    return await registry.models.GetVersion(pb.GetVersionRequest(model="digits", **selector))


async def status_of(registry: Registry, digest: str) -> bool:
    request = artifact_service_pb2.QueryWriteStatusRequest(digest=digest)
    return (await registry.artifacts.QueryWriteStatus(request)).complete


async def test_creates_with_everything(registry: Registry) -> None:
    await registry.model()
    given = {
        "parity": PARITY,
        "metrics": {"test_accuracy": 0.97},
        "labels": ["zero", "один"],
        "provenance": {"job_id": "job-1", "dataset": "digits", "dataset_digest": blob_of(b"rows").digest},
        "description": "the first",
    }

    made = await registry.version(**given, number=99, bundle_digest="ignored")

    expected = described(**given)
    expected.number = 1
    expected.bundle_digest = made.bundle_digest
    expected.create_time.CopyFrom(made.create_time)
    expected.files["manifest.json"].CopyFrom(made.files["manifest.json"])
    assert made == expected
    assert made.create_time.seconds > 0
    assert (await get(registry, number=1)).version == made


async def test_the_manifest_names_the_content(registry: Registry) -> None:
    await registry.model()
    made = await registry.version(parity=PARITY, labels=["zero", "один"])

    text = await registry.stored(made.bundle_digest)

    assert made.files["manifest.json"] == Blob(digest=made.bundle_digest, size_bytes=len(text))
    manifest = json.loads(text)
    assert text == json.dumps(manifest, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
    assert manifest["files"] == {"model.onnx": {"digest": blob_of(GRAPH).digest, "size_bytes": len(GRAPH)}}
    assert manifest["inputs"] == [{"name": "image", "datatype": "FP32", "shape": ["batch", 64]}]
    assert manifest["labels"] == ["zero", "один"]
    assert manifest["parity"]["max_absolute_error"] == PARITY.max_absolute_error


async def test_equal_content_has_equal_digests(registry: Registry) -> None:
    await registry.model()
    await registry.model("others")
    first = await registry.version(metrics={"accuracy": 0.1}, description="one")
    same = await registry.version("others", metrics={"accuracy": 0.2}, description="two")
    other = await registry.version(labels=["zero"])

    assert first.bundle_digest == same.bundle_digest != other.bundle_digest


async def test_a_blob_that_is_missing(registry: Registry) -> None:
    await registry.model()
    await registry.store(GRAPH)
    absent = blob_of(b"never written")
    files = {"model.onnx": blob_of(GRAPH), "weights.bin": absent}

    code, text, _ = await refusal(registry.version(files=files))

    assert code == grpc.StatusCode.NOT_FOUND
    assert absent.digest in text
    assert "'weights.bin'" in text
    assert (await registry.models.GetModel(pb.GetModelRequest(name="digits"))).model.latest_version == 0


async def test_a_blob_of_another_size(registry: Registry) -> None:
    await registry.model()
    wrong = Blob(digest=blob_of(GRAPH).digest, size_bytes=len(GRAPH) + 1)

    code, text, fields = await refusal(registry.version(files={"model.onnx": wrong}))

    assert (code, fields) == (grpc.StatusCode.INVALID_ARGUMENT, ['version.files["model.onnx"].size_bytes'])
    assert f"the blob has {len(GRAPH)} bytes; got {len(GRAPH) + 1}" in text


async def test_the_limits_themselves_are_allowed(registry: Registry) -> None:
    await registry.model()
    graph = blob_of(GRAPH)

    made = await registry.version(
        files={"model.onnx": graph} | {f"{number:0200}": graph for number in range(99)},
        metrics={str(number): float(number) for number in range(100)},
        labels=["label"] * 10_000,
        description="é" * 1000,
    )

    assert len(made.files) == 101
    assert len(made.labels) == 10_000


async def test_the_same_request_makes_one_version(registry: Registry) -> None:
    await registry.model()
    first = await registry.version(request_id="r-1", metrics={"loss": math.nan})

    again = await registry.version(request_id="r-1", metrics={"loss": math.nan}, number=5)
    code, text, _ = await refusal(registry.version(request_id="r-1", metrics={"loss": 1.0}))

    # As text: NaN is not equal to itself.
    assert str(again) == str(first)
    assert code == grpc.StatusCode.ALREADY_EXISTS
    assert "digits/1" in text
    assert (await registry.version()).number == 2
    assert (await registry.version()).number == 3


async def test_concurrent_calls_get_consecutive_numbers(registry: Registry) -> None:
    await registry.model()
    await registry.store(GRAPH)

    made = await asyncio.gather(*(registry.version(request_id=f"r{index % 20}") for index in range(40)))

    assert sorted({version.number for version in made}) == list(range(1, 21))
    assert (await registry.models.GetModel(pb.GetModelRequest(name="digits"))).model.latest_version == 20


async def test_gets_by_number_by_alias_and_the_newest(registry: Registry) -> None:
    await registry.model(versions=3)
    await registry.alias("champion", 2)

    assert (await get(registry)).version.number == 3
    assert (await get(registry, number=1)).version.number == 1
    assert (await get(registry, alias="champion")).version.number == 2
    for selector, missing in (({"number": 4}, "version 'digits/4'"), ({"alias": "absent"}, "alias 'digits/absent'")):
        code, text, _ = await refusal(get(registry, **selector))
        assert code == grpc.StatusCode.NOT_FOUND
        assert missing in text


async def test_a_model_without_versions_has_no_newest(registry: Registry) -> None:
    await registry.model()

    code, text, _ = await refusal(get(registry))

    assert code == grpc.StatusCode.NOT_FOUND
    assert "The model has no versions" in text


async def test_lists_newest_first_in_pages(registry: Registry) -> None:
    await registry.model(versions=5)
    await registry.model("others", versions=1)

    first = await registry.models.ListVersions(pb.ListVersionsRequest(model="digits", page_size=3))
    rest = await registry.models.ListVersions(
        pb.ListVersionsRequest(model="digits", page_size=3, page_token=first.next_page_token)
    )

    assert [version.number for version in first.versions] == [5, 4, 3]
    assert [version.number for version in rest.versions] == [2, 1]
    assert rest.next_page_token == ""


async def test_a_number_is_never_used_again(registry: Registry) -> None:
    await registry.model(versions=2)

    await registry.models.DeleteVersion(pb.DeleteVersionRequest(model="digits", number=2))

    assert (await get(registry)).version.number == 1
    assert (await registry.models.GetModel(pb.GetModelRequest(name="digits"))).model.latest_version == 2
    assert (await registry.version()).number == 3


async def test_a_version_in_use_stays(registry: Registry) -> None:
    await registry.model(versions=1)
    await registry.alias("champion", 1)

    code, text, _ = await refusal(registry.models.DeleteVersion(pb.DeleteVersionRequest(model="digits", number=1)))

    assert code == grpc.StatusCode.FAILED_PRECONDITION
    assert "aliases champion" in text
    assert (await get(registry, number=1)).version.number == 1


async def test_blobs_go_with_the_last_version_that_refers_to_them(registry: Registry) -> None:
    await registry.model()
    await registry.model("others")
    own = await registry.store(b"labels of one version")
    first = await registry.version(files={"model.onnx": blob_of(GRAPH), "labels.txt": own})
    await registry.version("others")

    await registry.models.DeleteVersion(pb.DeleteVersionRequest(model="digits", number=1))

    assert not await status_of(registry, own.digest)
    assert not await status_of(registry, first.bundle_digest)
    assert await status_of(registry, blob_of(GRAPH).digest)
    await registry.models.DeleteModel(pb.DeleteModelRequest(name="others"))
    assert not await status_of(registry, blob_of(GRAPH).digest)


async def test_deleting_never_leaves_a_version_without_its_blobs(registry: Registry) -> None:
    """Versions that share all blobs come and go at once; whatever version exists, its bytes do too."""
    await registry.model()
    refused: set[grpc.StatusCode] = set()

    async def come_and_go(worker: int) -> None:
        for step in range(8):
            try:
                made = await registry.version(request_id=f"w{worker}-{step}")
            except grpc.aio.AioRpcError as error:
                refused.add(error.code())
                continue
            if step % 2:
                await registry.models.DeleteVersion(pb.DeleteVersionRequest(model="digits", number=made.number))

    await asyncio.gather(*(come_and_go(worker) for worker in range(4)))

    # Another worker deleted the graph after this one wrote it, or wrote it at the same time.
    assert refused <= {grpc.StatusCode.NOT_FOUND, grpc.StatusCode.ABORTED}
    left = (await registry.models.ListVersions(pb.ListVersionsRequest(model="digits"))).versions
    assert left
    for version in left:
        for blob in version.files.values():
            assert len(await registry.stored(blob.digest)) == blob.size_bytes


async def test_a_corrupted_blob_is_found_and_can_be_written_again(tmp_path: Path) -> None:
    async with served(tmp_path) as registry:
        await registry.model(versions=1)
        digest = blob_of(GRAPH).digest
        [stored] = tmp_path.rglob(digest.removeprefix("sha256:"))
        stored.write_bytes(b"X" + GRAPH[1:])

        code, text, _ = await refusal(registry.stored(digest))

        assert code == grpc.StatusCode.DATA_LOSS
        assert digest in text
        code, _, _ = await refusal(registry.models.CreateVersion(pb.CreateVersionRequest(version=described())))
        assert code == grpc.StatusCode.NOT_FOUND
        await registry.store(GRAPH)
        assert await registry.stored(digest) == GRAPH
