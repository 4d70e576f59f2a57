"""Both clients against the real services, in this process."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import grpc
import numpy as np
import onnx
import pytest
import pytest_asyncio

from penstock.api.dataset.v1.dataset_pb2 import Dataset, DatasetFormat, Split
from penstock.api.registry.v1.deployment_service_pb2 import Deployment, DeploymentTarget
from penstock.api.registry.v1.model_pb2 import Version
from penstock.api.types.v1.signature_pb2 import Dimension, Signature, TensorSpec
from penstock.client import Addresses, AsyncClient, Client, PenstockError
from penstock.inference.app import application as inference
from penstock.inference.settings import InferenceSettings
from penstock.registry.app import application as registry
from penstock.registry.settings import RegistrySettings
from penstock.rpc.server import listening
from penstock.training.app import application as training
from penstock.training.settings import TrainingSettings

ROWS = "height,name\n1.5,a\n2.5,b\n3.5,c\n4.5,d\n"
BATCH = Dimension(name="batch")


@pytest_asyncio.fixture
async def addresses(tmp_path: Path) -> AsyncIterator[Addresses]:
    async with AsyncExitStack() as stack:

        async def start(application: Callable, settings: type, **flags: object) -> str:
            loaded = settings.load({"home": tmp_path, "port": 0, "drain_s": 1.0, **flags})
            running = await stack.enter_async_context(application(loaded))
            return await stack.enter_async_context(listening(loaded, running))

        at = await start(registry, RegistrySettings)
        trains = await start(training, TrainingSettings, registry=at)
        yield Addresses(at, trains, await start(inference, InferenceSettings, registry=at))


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    text = """<ir_version: 10, opset_import: ["" : 20]>
        twice (float[batch, 2] x, string[batch] s) => (float[batch, 2] y, string[batch] t) {
            y = Add(x, x)
            t = Identity(s)
        }"""
    onnx.save(onnx.parser.parse_model(text), tmp_path / "twice.onnx")
    return tmp_path / "twice.onnx"


def twice() -> Version:
    def tensors(number: str, text: str) -> list[TensorSpec]:
        return [
            TensorSpec(name=number, datatype="FP32", shape=[BATCH, Dimension(size=2)]),
            TensorSpec(name=text, datatype="BYTES", shape=[BATCH]),
        ]

    return Version(model="twice", signature=Signature(inputs=tensors("x", "s"), outputs=tensors("y", "t")))


async def test_the_asynchronous_client_goes_the_whole_way(addresses: Addresses, graph: Path, tmp_path: Path):
    async with AsyncClient(addresses) as client:
        await client.models.create("twice", "doubles")
        version = await client.models.create_version(twice(), {"model.onnx": graph}, "once")
        assert (
            (await client.models.create_version(twice(), {"model.onnx": graph}, "once")).number == version.number == 1
        )
        await client.models.set_alias("twice", "champion", 1, "first", expected_version=0)
        target = DeploymentTarget(alias="champion", weight=100)
        await client.deployments.set(Deployment(model="twice", targets=[target]))
        while not await client.inference.is_model_ready("twice"):  # noqa: ASYNC110  # it can only be asked for
            await asyncio.sleep(0.02)

        x, s = np.arange(6, dtype=np.float32).reshape(3, 2), np.array(["a", "ü", ""])
        result = await client.inference.infer("twice", {"x": x, "s": s})
        assert list(result.outputs) == ["y", "t"]
        np.testing.assert_array_equal(result.outputs["y"], 2 * x)
        assert result.outputs["t"].tolist() == [b"a", "ü".encode(), b""]
        assert (result.model, result.version) == ("twice", "1")
        only = await client.inference.infer("twice", {"x": x, "s": s}, version="1", outputs=["t"])
        assert list(only.outputs) == ["t"]

        assert [model.name for model in await client.models.list()] == ["twice"]
        assert [alias.name for alias in await client.models.list_aliases("twice")] == ["champion"]
        assert [move.reason for move in await client.models.list_alias_moves("twice", "champion")] == ["first"]
        assert (await client.models.get_version("twice", alias="champion")).number == 1
        assert [served.version for served in await client.deployments.serving("twice")] == [1]
        metadata = await client.inference.model_metadata("twice")
        assert {tensor.name: list(tensor.shape) for tensor in metadata.inputs} == {"x": [-1, 2], "s": [-1]}

        (tmp_path / "bundle").mkdir()
        transferred: list[int] = []
        await client.models.download(version, tmp_path / "bundle", transferred.append)
        assert (tmp_path / "bundle" / "model.onnx").read_bytes() == graph.read_bytes()
        assert sum(transferred) == sum(blob.size_bytes for blob in version.files.values())


@pytest.mark.parametrize("name", ["../escaped", "/tmp/escaped", ".hidden", "a/b", "", "nul\0"])
async def test_a_registry_cannot_lead_a_download_out_of_its_folder(addresses: Addresses, tmp_path: Path, name: str):
    version = Version(model="bad", number=1)
    version.files[name].size_bytes = 1
    async with AsyncClient(addresses) as client:
        with pytest.raises(ValueError, match="has a file named"):
            await client.models.download(version, tmp_path)


async def test_the_blocking_client_does_the_same_from_a_thread(addresses: Addresses, tmp_path: Path):
    rows = tmp_path / "rows.csv"
    rows.write_text(ROWS)

    def work() -> None:
        with Client(addresses) as client:
            made = client.datasets.create(Dataset(name="rows", format=DatasetFormat.DATASET_FORMAT_CSV), rows)
            assert made == client.datasets.get("rows") == client.datasets.list()[0]
            train = client.datasets.read("rows", Split.SPLIT_TRAIN)
            assert train["height"].dtype == np.float64
            assert {"1.5": "a", "2.5": "b", "3.5": "c", "4.5": "d"}.items() >= {
                str(height): name for height, name in zip(train["height"], train["name"], strict=True)
            }.items()
            assert len(train["name"]) == made.split_counts.train
            client.datasets.delete("rows")
            assert client.datasets.list() == []
            assert client.jobs.list() == []
            assert not client.inference.is_model_ready("nobody")

    await asyncio.to_thread(work)


async def test_more_than_a_page_is_listed_whole(addresses: Addresses):
    async with AsyncClient(addresses) as client:
        names = [f"m{number:04}" for number in range(1005)]
        for start in range(0, len(names), 100):
            await asyncio.gather(*(client.models.create(name) for name in names[start : start + 100]))
        assert [model.name for model in await client.models.list()] == names


async def test_an_error_carries_its_reason_and_the_offending_fields(addresses: Addresses, tmp_path: Path):
    async with AsyncClient(addresses) as client:
        with pytest.raises(PenstockError) as missing:
            await client.models.get("nobody")
        assert (missing.value.code, missing.value.reason) == (grpc.StatusCode.NOT_FOUND, "RESOURCE_NOT_FOUND")
        assert missing.value.metadata["resource_name"] == "nobody"
        assert missing.value.metadata["request_id"]

        rows = tmp_path / "rows.csv"
        rows.write_text(ROWS + "five,e\n")
        columns = [{"name": "height", "type": "COLUMN_TYPE_FLOAT64"}, {"name": "name", "type": "COLUMN_TYPE_STRING"}]
        dataset = Dataset(name="rows", format=DatasetFormat.DATASET_FORMAT_CSV, columns=columns)
        with pytest.raises(PenstockError) as wrong:
            await client.datasets.create(dataset, rows)
        assert wrong.value.code is grpc.StatusCode.INVALID_ARGUMENT
        [violation] = wrong.value.violations
        assert "6" in violation.field
        assert "height" in violation.field
        assert "'five'" in violation.description


async def test_a_server_that_is_away_is_waited_for_by_reads_and_then_named(tmp_path: Path):
    async with AsyncClient(Addresses("127.0.0.1:9", "127.0.0.1:9", "127.0.0.1:9")) as client:
        with pytest.raises(PenstockError) as error:
            await client.models.list()
    assert error.value.code is grpc.StatusCode.UNAVAILABLE
    assert error.value.reason == ""
