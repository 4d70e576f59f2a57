"""A folder of models through the wire: as it is, as it changes, and as clients ask for it."""

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import pytest_asyncio
import structlog
from google.protobuf import json_format
from onnx import helper
from tests.integration.inference import graphs
from tests.integration.inference.fleet import Inference, eventually, folder_server, infer_request, put_model

from penstock.inference.folder_models import FolderModels
from penstock.inference.inference import Loaded
from penstock.inference.metrics import LoadMetrics
from penstock.inference.opening import ModelFiles
from penstock.inference.repository import Repository
from penstock.inference.uploads import Uploads
from penstock.oip import inference_pb2 as pb
from penstock.rpc.errors import StorageFullError, WrongStateError

pytestmark = pytest.mark.asyncio(loop_scope="module")

ROWS = np.arange(8, dtype=np.float32).reshape(2, 4)

SLOW = """
import time
import numpy as np
class Model:
    def __init__(self, config):
        pass
    def infer(self, inputs, parameters):
        time.sleep(0.5)
        return {"scaled": inputs["rows"]}
"""
SLOW_CONFIG = """
    backend: "python"
    input { name: "rows" data_type: TYPE_FP32 dims: [-1, 4] }
    output { name: "scaled" data_type: TYPE_FP32 dims: [-1, 4] }
"""

Index = dict[str, tuple[str, str, str]]


def ensemble_of(*parts: str) -> str:
    """Models one behind the other, each of which takes `rows` and makes `scaled`."""
    names = ["rows", *(f"made{number}" for number in range(1, len(parts))), "scaled"]
    steps = "".join(
        f'step {{ model_name: "{part}" model_version: -1 input_map {{ key: "rows" value: "{taken}" }} '
        f'output_map {{ key: "scaled" value: "{made}" }} }}'
        for part, taken, made in zip(parts, names, names[1:], strict=False)
    )
    return f"""
        platform: "ensemble" max_batch_size: 8 ensemble_scheduling {{ {steps} }}
        input {{ name: "rows" data_type: TYPE_FP32 dims: [4] }}
        output {{ name: "scaled" data_type: TYPE_FP32 dims: [4] }}
    """


def put_ensemble(folder: Path, name: str, *parts: str) -> None:
    put_model(folder, name, graphs.Bundle({}, graphs.scale(1).signature), config=ensemble_of(*parts))


@asynccontextmanager
async def serving(tmp_path: Path, transport: str, mode: str, **settings: object) -> AsyncIterator[Inference]:
    folder = tmp_path / "models"
    folder.mkdir(exist_ok=True)
    async with folder_server(
        folder, tmp_path / "home", transport, mode=mode, poll_interval_s=0.1, **settings
    ) as server:
        yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bare(tmp_path_factory: pytest.TempPathFactory, transport: str) -> AsyncIterator[Inference]:
    """A server in mode explicit without a model, for tests of what is refused: they leave it as it was."""
    path = tmp_path_factory.mktemp("bare")
    put_model(path / "models", ".hidden", graphs.scale(2))
    async with serving(path, transport, "explicit") as server:
        yield server


async def index_of(server: Inference) -> Index:
    answer = await server.oip.RepositoryIndex(pb.RepositoryIndexRequest())
    return {entry.name: (entry.version, entry.state, entry.reason) for entry in answer.models}


async def load(server: Inference, model: str, config: object = None, **files: bytes) -> None:
    """`config` is JSON, or what becomes JSON."""
    request = pb.RepositoryModelLoadRequest(model_name=model)
    if config is not None:
        request.parameters["config"].string_param = config if isinstance(config, str) else json.dumps(config)
    for name, data in files.items():
        request.parameters[name].bytes_param = data
    await server.oip.RepositoryModelLoad(request, timeout=20)


async def unload(server: Inference, model: str, *, dependents: bool = False) -> None:
    request = pb.RepositoryModelUnloadRequest(model_name=model)
    request.parameters["unload_dependents"].bool_param = dependents
    await server.oip.RepositoryModelUnload(request, timeout=20)


async def failure(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value.code(), caught.value.details() or ""


async def factor(server: Inference, model: str) -> float:
    """What a model scales with; 0 if it does not answer."""
    try:
        answer = await server.oip.ModelInfer(infer_request(model, {"rows": ROWS}, outputs=("scaled",)), timeout=20)
    except grpc.aio.AioRpcError:
        return 0
    return float(np.frombuffer(answer.raw_output_contents[0], np.float32)[1])


async def becomes(server: Inference, model: str, wanted: float) -> None:
    async def reached() -> bool:
        return await factor(server, model) == wanted

    await eventually(reached)


def uploads(server: Inference) -> list[Path]:
    return [path for path in server.home.rglob("uploads/*") if path.is_dir()]


# Mode none.


async def test_a_broken_model_takes_nothing_from_those_beside_it(tmp_path: Path, transport: str) -> None:
    folder = tmp_path / "models"
    put_model(folder, "good", graphs.scale(2))
    put_model(folder, "torn", graphs.Bundle({"model.onnx": b"torn"}, graphs.scale(1).signature))
    put_model(folder, "odd", graphs.scale(2), config="name: 'even'")
    put_model(folder, ".hidden", graphs.scale(2))
    (folder / "empty").mkdir()
    async with serving(tmp_path, transport, "none") as server:
        await becomes(server, "good", 2)
        await server.settled(0)
        put_model(folder, "late", graphs.scale(2))
        index = await index_of(server)
        assert {name: entry[:2] for name, entry in index.items()} == {
            "good": ("1", "READY"),
            "torn": ("1", "UNAVAILABLE"),
            "odd": ("", "UNAVAILABLE"),
            "empty": ("", "UNAVAILABLE"),
            "late": ("", ""),
        }
        assert "its name is 'even'" in index["odd"][2]
        assert "no version" in index["empty"][2]
        assert await factor(server, "late") == 0


async def test_an_ensemble_that_is_part_of_itself_fails_and_waits_for_nothing(tmp_path: Path, transport: str) -> None:
    folder = tmp_path / "models"
    put_ensemble(folder, "self", "self")
    put_ensemble(folder, "chicken", "egg")
    put_ensemble(folder, "egg", "chicken")
    put_ensemble(folder, "outer", "inner", "scale")
    put_ensemble(folder, "inner", "scale", "scale")
    put_model(folder, "scale", graphs.scale(2))
    async with serving(tmp_path, transport, "none") as server:
        await becomes(server, "outer", 8)
        await server.settled(0)
        index = await index_of(server)
        assert {name for name, entry in index.items() if entry[1] == "READY"} == {"outer", "inner", "scale"}
        for name in ("self", "chicken", "egg"):
            assert index[name][1] == "UNAVAILABLE"
            assert "part of itself" in index[name][2]


@pytest.mark.parametrize(
    ("config", "fits"),
    [
        ("", False),
        ("input { name: 'a' dims: [-1] } input { name: 'b' dims: [-1] }", True),
        ("input { name: 'a' dims: [-1] } input { name: 'b' }", True),
        ("max_batch_size: 0 input { name: 'a' dims: [4] } input { name: 'b' dims: [2] }", True),
    ],
)
async def test_dims_of_minus_one_free_axes_of_one_name(tmp_path: Path, config: str, fits: bool, transport: str) -> None:
    bundle = graphs.bundle_of(
        [helper.make_node("ReduceSum", [name], [f"sum_{name}"], keepdims=1) for name in "ab"],
        [graphs.value(name, "FP32", ["length"]) for name in "ab"],
        [graphs.value(f"sum_{name}", "FP32", [1]) for name in "ab"],
    )
    put_model(tmp_path / "models", "sums", bundle, config=config)
    async with serving(tmp_path, transport, "none") as server:
        await server.settled(0)
        request = infer_request("sums", {"a": np.ones(4, np.float32), "b": np.ones(2, np.float32)})
        if fits:
            answer = await server.oip.ModelInfer(request)
            assert [np.frombuffer(raw, np.float32)[0] for raw in answer.raw_output_contents] == [4, 2]
        else:
            assert "expected axis 'length' to be 4" in (await failure(server.oip.ModelInfer(request)))[1]


async def test_a_batch_or_a_padded_axis_is_never_free(tmp_path: Path, transport: str) -> None:
    config = """
        max_batch_size: 8 input { name: "left" dims: [-1] } input { name: "right" dims: [-1] }
        parameters { key: "pad_axis" value { string_value: "sequence" } }
        parameters { key: "pad_buckets" value { string_value: "8" } }
    """
    put_model(tmp_path / "models", "pair", graphs.pair(), config=config)
    async with serving(tmp_path, transport, "none") as server:
        await server.settled(0)
        for right, axis in (((2, 4), "sequence"), ((1, 3), "batch")):
            inputs = {"left": np.ones((2, 3), np.int32), "right": np.ones(right, np.int32)}
            details = (await failure(server.oip.ModelInfer(infer_request("pair", inputs))))[1]
            assert f"expected axis '{axis}' to be" in details


# Mode poll.


async def test_a_poll_finds_models_that_are_new_changed_and_gone(tmp_path: Path, transport: str) -> None:
    folder = tmp_path / "models"
    put_model(folder, "one", graphs.scale(2))
    async with serving(tmp_path, transport, "poll") as server:
        await becomes(server, "one", 2)
        put_model(folder, "two", graphs.scale(3))
        await becomes(server, "two", 3)
        put_model(folder, "one", graphs.scale(5))
        await becomes(server, "one", 5)
        put_model(folder, "one", graphs.scale(7), number=2)
        await becomes(server, "one", 7)
        shutil.rmtree(folder / "two")
        await becomes(server, "two", 0)
        assert {name: entry[:2] for name, entry in (await index_of(server)).items()} == {"one": ("2", "READY")}


@pytest.mark.parametrize("torn", ["model", "configuration", "name", "folder"], ids=lambda torn: f"torn {torn}")
async def test_a_half_written_model_leaves_the_old_one_serving(tmp_path: Path, transport: str, torn: str) -> None:
    folder = tmp_path / "models"
    put_model(folder, "one", graphs.scale(2))
    async with serving(tmp_path, transport, "poll") as server:
        await becomes(server, "one", 2)
        match torn:
            case "model":
                whole = graphs.scale(3).files["model.onnx"]
                (folder / "one" / "1" / "model.onnx").write_bytes(whole[: len(whole) // 2])
            case "configuration":
                (folder / "one" / "config.pbtxt").write_text("input {")
            case "name":
                (folder / "one" / "config.pbtxt").write_text("name: 'other'")
            case "folder":
                shutil.rmtree(folder / "one" / "1")
        put_model(folder, "mark", graphs.scale(4))
        await becomes(server, "mark", 4)
        await asyncio.sleep(0.3)
        assert await factor(server, "one") == 2
        (folder / "one" / "config.pbtxt").unlink(missing_ok=True)
        put_model(folder, "one", graphs.scale(3))
        await becomes(server, "one", 3)


async def test_a_model_that_failed_is_tried_again_when_it_has_changed_and_not_at_every_poll(
    tmp_path: Path, transport: str
) -> None:
    folder = tmp_path / "models"
    put_model(folder, "torn", graphs.Bundle({"model.onnx": b"torn"}, graphs.scale(1).signature))
    async with serving(tmp_path, transport, "poll") as server:
        await server.settled(0)
        (failed,) = await server.served("torn")
        await asyncio.sleep(0.5)
        # Another try would show in its time.
        assert await server.served("torn") == [failed]
        put_model(folder, "torn", graphs.scale(2))
        await becomes(server, "torn", 2)


async def test_unknown_fields_are_warned_of_once_and_when_they_change(tmp_path: Path) -> None:
    folder = tmp_path / "models"

    def warned(logs: list[Any]) -> list[list[str]]:
        return [log["fields"] for log in logs if log["event"].startswith("unknown fields")]

    put_model(folder, "one", graphs.scale(2), config="gone: 1")
    # On grpcio alone, where the log is this process's.
    with structlog.testing.capture_logs() as logs:
        async with serving(tmp_path, "grpcio", "poll") as server:
            await becomes(server, "one", 2)
            await asyncio.sleep(0.4)
            assert warned(logs) == [["gone (line 1)"]]
            put_model(folder, "one", graphs.scale(3), config="max_batch_size: 4\ngone: 1")
            await becomes(server, "one", 3)
            await asyncio.sleep(0.4)
        assert warned(logs) == [["gone (line 1)"], ["gone (line 2)"]]
    with structlog.testing.capture_logs() as logs:
        async with serving(tmp_path, "grpcio", "explicit") as server:
            await load(server, "one")
    assert warned(logs) == [["gone (line 2)"]]


async def test_a_folder_that_is_away_for_a_while_stops_nothing(tmp_path: Path, transport: str) -> None:
    folder = tmp_path / "models"
    put_model(folder, "one", graphs.scale(2))
    async with serving(tmp_path, transport, "poll") as server:
        await becomes(server, "one", 2)
        folder.rename(tmp_path / "away")
        await asyncio.sleep(0.3)
        assert await factor(server, "one") == 2
        (tmp_path / "away").rename(folder)
        put_model(folder, "one", graphs.scale(3))
        await becomes(server, "one", 3)


async def test_models_are_not_loaded_by_request_in_mode_poll(tmp_path: Path, transport: str) -> None:
    async with serving(tmp_path, transport, "poll") as server:
        for call in (load(server, "one"), unload(server, "one")):
            assert "explicit model load / unload is not allowed" in (await failure(call))[1]


# Mode explicit.


async def test_the_start_loads_what_it_is_told_to_with_its_parts(tmp_path: Path, transport: str) -> None:
    folder = tmp_path / "models"
    put_ensemble(folder, "both", "scale", "scale")
    put_model(folder, "scale", graphs.scale(2))
    put_model(folder, "other", graphs.scale(3))
    async with serving(tmp_path, transport, "explicit", load_model="both") as server:
        await becomes(server, "both", 4)
        assert (await index_of(server))["other"] == ("", "", "")


async def test_a_load_replaces_what_is_served_and_a_failed_one_does_not(tmp_path: Path, transport: str) -> None:
    folder = tmp_path / "models"
    put_model(folder, "one", graphs.scale(2))
    async with serving(tmp_path, transport, "explicit") as server:
        await load(server, "one")
        await load(server, "one")
        put_model(folder, "one", graphs.scale(3))
        assert await factor(server, "one") == 2
        await load(server, "one", {"max_batch_size": 4})
        assert await factor(server, "one") == 3
        put_model(folder, "one", graphs.Bundle({"model.onnx": b"torn"}, graphs.scale(1).signature))
        for config in (None, {"max_batch_size": 5}, {"name": "other"}, {"backend": "tensorrt"}, "{", "[" * 100_000):
            code, details = await failure(load(server, "one", config))
            assert (code, "failed to load 'one'" in details) == (grpc.StatusCode.FAILED_PRECONDITION, True)
            assert await factor(server, "one") == 3
        assert await index_of(server) == {"one": ("1", "READY", "")}
        put_model(folder, "one", graphs.scale(5))
        await load(server, "one")
        assert await factor(server, "one") == 5
        assert len(await server.served("one")) == 1


async def test_a_load_of_what_failed_is_another_try(tmp_path: Path, transport: str) -> None:
    folder = tmp_path / "models"
    put_ensemble(folder, "pipe", "part")
    async with serving(tmp_path, transport, "explicit") as server:
        # The ensemble itself stays as it is: what it lacks is somewhere else.
        for _ in range(2):
            assert "failed to load" in (await failure(load(server, "pipe")))[1]
        put_model(folder, "part", graphs.Bundle({"model.onnx": b"torn"}, graphs.scale(1).signature))
        reasons = [(await failure(load(server, "part")))[1] for _ in range(2)]
        assert reasons[0] == reasons[1]
        assert (await index_of(server))["part"][:2] == ("", "UNAVAILABLE")
        put_model(folder, "part", graphs.scale(2))
        await load(server, "pipe")
        assert await factor(server, "pipe") == 2
        assert {entry[1:] for entry in (await index_of(server)).values()} == {("READY", "")}


@pytest.mark.parametrize("name", ["nobody", "x" * 200])
async def test_a_model_without_a_folder_fails_to_load(bare: Inference, name: str) -> None:
    code, details = await failure(load(bare, name))
    assert (code, "failed to load" in details) == (grpc.StatusCode.FAILED_PRECONDITION, True)
    assert (await failure(unload(bare, name)))[0] is grpc.StatusCode.NOT_FOUND
    assert not await index_of(bare)


@pytest.mark.parametrize("name", ["", ".", "..", "../models", "a/b", "/etc", ".hidden", "x" * 201, "a\0"])
async def test_names_never_become_paths(bare: Inference, name: str) -> None:
    model = graphs.scale(2).files["model.onnx"]
    for call in (load(bare, name), load(bare, name, {}, **{"file:1/model.onnx": model})):
        assert (await failure(call))[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert not uploads(bare)


async def test_an_upload_is_served_in_place_of_the_folder_until_it_is_unloaded(tmp_path: Path, transport: str) -> None:
    put_model(tmp_path / "models", "one", graphs.scale(2))
    async with serving(tmp_path, transport, "explicit") as server:
        for number in (3, 4):
            files = {"file:7/model.onnx": graphs.scale(number).files["model.onnx"]}
            await load(server, "one", {}, **files)
            assert await factor(server, "one") == number
            await server.settled(0)
            assert [one.version for one in await server.served("one")] == [7]
            assert len(uploads(server)) == 1
        code, details = await failure(load(server, "one", {}, **{"file:1/model.onnx": b"torn"}))
        assert (code, "failed to load" in details) == (grpc.StatusCode.FAILED_PRECONDITION, True)
        assert await factor(server, "one") == 4
        await load(server, "one")
        assert (await factor(server, "one"), uploads(server)) == (2, [])
        await load(server, "new", {"max_batch_size": 2}, **files)
        assert await factor(server, "new") == 4
        await unload(server, "new")
        assert (await factor(server, "new"), uploads(server)) == (0, [])
        assert {name: entry[:2] for name, entry in (await index_of(server)).items()} == {"one": ("1", "READY")}


async def test_uploads_are_gone_when_the_server_has_stopped(tmp_path: Path, transport: str) -> None:
    files = {"file:1/model.onnx": graphs.scale(3).files["model.onnx"]}
    async with serving(tmp_path, transport, "explicit") as server:
        await load(server, "one", {}, **files)
        assert await factor(server, "one") == 3
    assert not [path for path in tmp_path.rglob("uploads/**/*") if path.is_file()]


async def test_nothing_is_uploaded_to_a_server_that_has_stopped(tmp_path: Path) -> None:
    kept = Uploads(tmp_path / "uploads")
    kept.close()
    with pytest.raises(StorageFullError):
        await kept.keep("one", {"file:1/model.onnx": b"graph"})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "key",
    [
        "file:1/../x",
        "file:1/..",
        "file:0/x",
        "file:-1/x",
        "file:01/x",
        "file:../x",
        "file:1/a/b",
        "file:1//etc/x",
        "file:1/",
        "file:1",
        "file:x",
        "file:/x",
        "file:1/.hidden",
        "file:1/a\nb",
        "file:1/a\0",
        f"file:1/{'x' * 201}",
        f"file:{'9' * 19}/x",
        "file:1/model.py",
        "file:1/Model.PYC",
    ],
    ids=lambda key: ascii(key)[:20],
)
async def test_the_names_of_uploads_are_plain(bare: Inference, key: str) -> None:
    model = graphs.scale(2).files["model.onnx"]
    code, _ = await failure(load(bare, "one", {}, **{"file:1/model.onnx": model, key: b"x"}))
    assert (code, uploads(bare)) == (grpc.StatusCode.INVALID_ARGUMENT, [])


async def test_uploads_come_with_a_configuration(bare: Inference) -> None:
    files = {"file:1/model.onnx": graphs.scale(2).files["model.onnx"]}
    code, details = await failure(load(bare, "one", None, **files))
    assert (code, "config" in details) == (grpc.StatusCode.INVALID_ARGUMENT, True)


@pytest.mark.parametrize(
    "config",
    [
        {"backend": "python"},
        {"platform": "python"},
        {"backend": "python", "defaultModelFilename": "model.txt"},
        {"backend": "python", "versionPolicy": {"all": {}}},
    ],
)
async def test_code_that_is_uploaded_is_never_run(bare: Inference, tmp_path: Path, config: dict[str, object]) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n{SLOW}".encode()
    declared = {
        "input": [{"name": "rows", "dataType": "TYPE_FP32", "dims": [4]}],
        "output": [{"name": "scaled", "dataType": "TYPE_FP32", "dims": [4]}],
    }
    for name in ("model.py", "model.txt", "model"):
        status, details = await failure(load(bare, "one", {**declared, **config}, **{f"file:1/{name}": code}))
        assert status in (grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.FAILED_PRECONDITION), details
        assert "ython" in details
    assert (ran.exists(), uploads(bare), await index_of(bare)) == (False, [], {})


@pytest.mark.parametrize(
    ("own", "given"),
    [
        ("", {"backend": "python"}),
        ("", {"platform": "python"}),
        ("", {"backend": "python", "default_model_filename": "wipe.py"}),
        ("", {"default_model_filename": "other.onnx"}),
        ("", {"platform": "ensemble", "ensemble_scheduling": {"step": [{"model_name": "other"}]}}),
        ("torn {", {"backend": "python"}),
        ('backend: "tensorrt"', {"backend": "python"}),
        ('backend: "python"', {"backend": "python", "default_model_filename": "wipe.py"}),
        ('backend: "python"', {}),
    ],
)
async def test_clients_do_not_choose_what_is_run(
    tmp_path: Path, own: str, given: dict[str, object], transport: str
) -> None:
    ran = tmp_path / "ran"
    code = f"open({str(ran)!r}, 'w')\n{SLOW}".encode()
    files = {**graphs.scale(2).files, "other.onnx": graphs.scale(3).files["model.onnx"]}
    bundle = graphs.Bundle({**files, "model.py": code, "wipe.py": code}, graphs.scale(2).signature)
    put_model(tmp_path / "models", "one", bundle, config=own)
    declared = {
        "input": [{"name": "rows", "data_type": "TYPE_FP32", "dims": [-1, 4]}],
        "output": [{"name": "scaled", "data_type": "TYPE_FP32", "dims": [-1, 4]}],
    }
    async with serving(tmp_path, transport, "explicit") as server:
        code_of, details = await failure(load(server, "one", {**declared, **given}))
        assert (code_of, "only its own config.pbtxt can change" in details) == (
            grpc.StatusCode.FAILED_PRECONDITION,
            True,
        )
        assert not ran.exists()


async def test_clients_may_change_what_is_run_as_the_operator_says(tmp_path: Path, transport: str) -> None:
    slow = graphs.Bundle({"run.py": SLOW.encode()}, graphs.scale(1).signature)
    put_model(tmp_path / "models", "slow", slow, config=f'{SLOW_CONFIG} default_model_filename: "run.py"')
    put_model(tmp_path / "models", "one", graphs.scale(2))
    async with serving(tmp_path, transport, "explicit") as server:
        for name in ("slow", "one"):
            await load(server, name)
            answer = await server.oip.ModelConfig(pb.ModelConfigRequest(name=name))
            given = json_format.MessageToDict(answer.config, preserving_proto_field_name=True)
            await load(server, name, {**given, "parameters": {"more": {"string_value": "1"}}})
            answer = await server.oip.ModelConfig(pb.ModelConfigRequest(name=name))
            assert answer.config.parameters["more"].string_value == "1"


async def test_names_that_clients_choose_leave_nothing_behind(tmp_path: Path, transport: str) -> None:
    put_model(tmp_path / "models", "known", graphs.scale(2))
    async with serving(tmp_path, transport, "explicit") as server:
        for number in range(20):
            await failure(load(server, f"torn{number}", {}, **{"file:1/model.onnx": b"torn"}))
            await failure(load(server, f"nobody{number}"))
            await failure(unload(server, f"nobody{number}"))
        files = {"file:1/model.onnx": graphs.scale(2).files["model.onnx"]}
        for number in range(3):
            await load(server, f"fine{number}", {}, **files)
            await unload(server, f"fine{number}")
        assert (uploads(server), await index_of(server)) == ([], {"known": ("", "", "")})


class NoOpener:
    """Opens nothing, and notes what it was asked to trust."""

    def __init__(self) -> None:
        self.trusted: dict[str, bool] = {}

    async def open(self, files: ModelFiles) -> Loaded:
        self.trusted[files.model] = files.trusted
        raise WrongStateError("It opens nothing.")


async def test_only_the_operators_folder_is_trusted_and_no_name_is_remembered(tmp_path: Path) -> None:
    put_model(tmp_path / "models", "own", graphs.scale(2))
    repository, opener = Repository(lambda _: None, LoadMetrics(), retries=False), NoOpener()
    kept = Uploads(tmp_path / "uploads")
    models = FolderModels(tmp_path / "models", repository, opener, kept, explicit=True)
    uploaded = {"file:1/model.onnx": graphs.scale(2).files["model.onnx"]}
    for name, files in (("own", {}), ("theirs", uploaded), ("other", uploaded)):
        with pytest.raises(WrongStateError, match="It opens nothing"):
            await models.load(name, "{}", files)
    assert opener.trusted == {"own": True, "theirs": False, "other": False}
    # What a client cannot see and an operator would, after a year.
    assert (vars(models)["_locks"], set(vars(models)["_problems"]), vars(kept)["_of_model"]) == ({}, {"own"}, {})
    await repository.close()


async def test_an_unload_waits_for_what_is_in_flight(tmp_path: Path, transport: str) -> None:
    slow = graphs.Bundle({"model.py": SLOW.encode()}, graphs.scale(1).signature)
    put_model(tmp_path / "models", "slow", slow, config=SLOW_CONFIG)
    async with serving(tmp_path, transport, "explicit") as server:
        await load(server, "slow")
        answers = [asyncio.ensure_future(server.infer("slow", ROWS)) for _ in range(2)]
        await asyncio.sleep(0.1)
        await unload(server, "slow")
        assert all(answer.done() for answer in answers)
        assert [answer.result().raw_output_contents[0] for answer in answers] == [ROWS.tobytes()] * 2
        assert await index_of(server) == {"slow": ("", "UNAVAILABLE", "unloaded")}
        assert (await failure(unload(server, "slow")))[0] is grpc.StatusCode.NOT_FOUND


async def test_an_unload_gives_up_the_load_in_progress_and_those_that_wait(tmp_path: Path, transport: str) -> None:
    rows = {"data_type": "TYPE_FP32", "dims": ["4"], "zero_data": True}
    config = {"model_warmup": [{"name": "long", "batch_size": 1, "count": 1000, "inputs": {"rows": rows}}]}
    put_model(tmp_path / "models", "other", graphs.scale(2))
    async with serving(tmp_path, transport, "explicit") as server:
        files = {"file:1/model.onnx": graphs.slow().files["model.onnx"]}
        loads = [asyncio.ensure_future(failure(load(server, "slow", config, **files))) for _ in range(2)]

        async def loading() -> bool:
            return (await index_of(server)).get("slow", ("", "", ""))[1] == "LOADING" and len(uploads(server)) == 2

        await eventually(loading)
        async with asyncio.timeout(5):
            await unload(server, "slow")
            for code, details in await asyncio.gather(*loads):
                assert (code, "it was unloaded while it loaded" in details) == (
                    grpc.StatusCode.FAILED_PRECONDITION,
                    True,
                )
            # Its run has ended: the one place to open models in is free.
            await load(server, "other")
        assert (await index_of(server), uploads(server)) == ({"other": ("1", "READY", "")}, [])


async def test_a_client_that_hangs_up_leaves_the_model_in_order(tmp_path: Path, transport: str) -> None:
    put_model(tmp_path / "models", "one", graphs.scale(2))
    async with serving(tmp_path, transport, "explicit") as server:
        for pause in (0, 0.001, 0.002, 0.004, 0.008):
            files = {"file:1/model.onnx": graphs.scale(3).files["model.onnx"]}
            calls = [asyncio.ensure_future(load(server, "one", {}, **some)) for some in (files, {})]
            await asyncio.sleep(pause)
            for call in calls:
                call.cancel()
            await asyncio.wait(calls)

        async def in_order() -> bool:
            await load(server, "one")
            held = [one.version for one in await server.served("one")]
            return (await factor(server, "one"), held, uploads(server)) == (2, [1], [])

        await eventually(in_order)


async def test_loads_at_the_same_time_take_turns(tmp_path: Path, transport: str) -> None:
    put_model(tmp_path / "models", "one", graphs.scale(1))
    async with serving(tmp_path, transport, "explicit") as server:
        models = {number: graphs.scale(number).files["model.onnx"] for number in range(2, 6)}
        calls = [load(server, "one", {}, **{"file:1/model.onnx": model}) for model in models.values()]
        await asyncio.gather(*calls)
        assert await factor(server, "one") in models
        assert (len(await server.served("one")), len(uploads(server))) == (1, 1)


async def test_an_ensemble_is_loaded_and_unloaded_with_its_parts(tmp_path: Path, transport: str) -> None:
    folder = tmp_path / "models"
    put_ensemble(folder, "outer", "inner", "scale")
    put_ensemble(folder, "inner", "scale", "scale")
    put_model(folder, "scale", graphs.scale(2))
    async with serving(tmp_path, transport, "explicit") as server:
        await load(server, "outer")
        assert await factor(server, "outer") == 8
        await unload(server, "outer", dependents=True)
        assert {entry[1:] for entry in (await index_of(server)).values()} == {("UNAVAILABLE", "unloaded")}
        await load(server, "outer")
        await unload(server, "outer")
        assert await factor(server, "inner") == 4


@pytest.mark.parametrize(
    ("ensembles", "loaded"),
    [
        ({"self": ["self"]}, "self"),
        ({"a": ["b"], "b": ["a"]}, "a"),
        ({"a": ["b"], "b": ["scale", "c"], "c": ["b"]}, "a"),
        ({"a": ["../models/scale"]}, "a"),
    ],
)
async def test_an_ensemble_without_an_end_fails_to_load(
    tmp_path: Path, transport: str, ensembles: dict[str, list[str]], loaded: str
) -> None:
    folder = tmp_path / "models"
    put_model(folder, "scale", graphs.scale(2))
    for name, parts in ensembles.items():
        put_ensemble(folder, name, *parts)
    async with serving(tmp_path, transport, "explicit") as server:
        calls = [failure(load(server, name)) for name in ensembles]
        for code, details in await asyncio.gather(*calls):
            assert code is grpc.StatusCode.FAILED_PRECONDITION
            assert "part of itself" in details or "not the name of a model" in details
        assert await factor(server, loaded) == 0
