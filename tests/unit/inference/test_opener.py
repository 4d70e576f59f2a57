"""What a graph and a configuration make together: signature, complete configuration, and a model that answers."""

import asyncio
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from google.protobuf import text_format
from onnx import helper
from tests.integration.inference import graphs

from penstock.inference.engine import Stop
from penstock.inference.ensemble_graph import Member
from penstock.inference.inference import Inference, Loaded
from penstock.inference.onnx_engine import OnnxEngine
from penstock.inference.onnx_model import OnnxOptions
from penstock.inference.opener import ModelOpener
from penstock.inference.opening import ModelFiles
from penstock.inference.signature import Signature
from penstock.inference.tensors import Array
from penstock.oip import model_config_pb2 as pb
from penstock.rpc.errors import InvalidFieldError, WrongStateError

OPTIONS = OnnxOptions(
    max_batch_size=16,
    intra_op_threads=1,
    warm_up=True,
    inline_threshold_us=1_000_000,
    execution_providers=("cuda", "cpu"),
)


def no_models(name: str, version: str) -> Member:
    raise WrongStateError(f"There is no model {name!r}.")


async def opened(
    folder: Path, bundle: graphs.Bundle, config: str = "", signature: Signature | None = None, **options: object
) -> Loaded:
    version = folder / "1"
    version.mkdir(exist_ok=True)
    for name, data in bundle.files.items():
        (version / name).write_bytes(data)
    parsed = text_format.Parse(config, pb.ModelConfig())
    opener = ModelOpener(replace(OPTIONS, **options), 10, None, no_models)
    return await opener.open(ModelFiles("m", 1, version, parsed, signature, {}))


async def answers(loaded: Loaded, **inputs: Array) -> list[Array]:
    rows = len(next(iter(inputs.values()))) if loaded.signature.batched else 1
    return await loaded.scheduler.infer(Inference(dict(inputs), tuple(loaded.signature.outputs), rows))


def shapes(loaded: Loaded) -> dict[str, tuple[int | str, ...]]:
    return {
        tensor.name: tensor.shape for tensor in (*loaded.signature.inputs.values(), *loaded.signature.outputs.values())
    }


async def test_a_configuration_is_completed_from_the_graph(tmp_path: Path) -> None:
    loaded = await opened(tmp_path, graphs.scale(2))
    config = loaded.config
    assert (config.name, config.platform, config.backend) == ("m", "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 16
    assert [(one.name, one.data_type, list(one.dims)) for one in (*config.input, *config.output)] == [
        ("rows", pb.TYPE_FP32, [4]),
        ("scaled", pb.TYPE_FP32, [4]),
        ("total", pb.TYPE_FP32, [1]),
    ]
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, pb.ModelInstanceGroup.KIND_CPU)]
    assert config.parameters["execution_providers"].string_value == "CPUExecutionProvider"
    assert config.HasField("dynamic_batching")
    scaled, total = await answers(loaded, rows=np.ones((3, 4), np.float32))
    assert scaled.tolist() == [[2] * 4] * 3
    assert total.tolist() == [[8]] * 3
    await loaded.scheduler.close()


async def test_a_batch_axis_proves_itself_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows, run = [], OnnxEngine.run

    def noted(engine: OnnxEngine, inputs: dict[str, Array], outputs: list[str], stop: Stop | None) -> list[Array]:
        rows.append(len(inputs["rows"]))
        return run(engine, inputs, outputs, stop)

    monkeypatch.setattr(OnnxEngine, "run", noted)
    loaded = await opened(tmp_path, graphs.scale(2), inline_threshold_us=0)
    assert (loaded.signature.batched, rows) == (True, [2, 1])
    await loaded.scheduler.close()


@pytest.mark.parametrize("op", ["LSTM", "GRU"])
async def test_no_rows_do_not_reach_a_recurrent_layer(tmp_path: Path, op: str) -> None:
    loaded = await opened(tmp_path, graphs.recurrent(op))
    for shape in ((0, 3, 2), (1, 0, 2)):
        # ONNX Runtime would end this process.
        with pytest.raises(InvalidFieldError, match="input 'rows': expected at least one element"):
            await answers(loaded, rows=np.ones(shape, np.float32))
    assert (await answers(loaded, rows=np.ones((2, 3, 2), np.float32)))[0].shape == (2, 1, 3, 4)
    await loaded.scheduler.close()


async def test_dims_in_full_say_that_there_is_no_batch(tmp_path: Path) -> None:
    loaded = await opened(
        tmp_path,
        graphs.scale(2),
        'input { name: "rows" dims: [-1, 4] } output { name: "total" dims: [-1, 1] }',
    )
    assert not loaded.signature.batched
    assert loaded.config.max_batch_size == 0
    assert shapes(loaded) == {"rows": ("rows", 4), "total": ("rows", 1)}
    assert (await answers(loaded, rows=np.ones((2, 4), np.float32)))[0].tolist() == [[8], [8]]
    await loaded.scheduler.close()


async def test_a_first_axis_that_is_no_batch_is_found_out(tmp_path: Path) -> None:
    loaded = await opened(tmp_path, graphs.first_row())
    assert not loaded.signature.batched
    assert (await answers(loaded, rows=np.ones((5, 4), np.float32)))[0].shape == (1, 4)
    await loaded.scheduler.close()


async def test_a_first_axis_that_is_said_to_be_a_batch_and_is_none_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(WrongStateError, match="'first' does not follow the batch"):
        await opened(tmp_path, graphs.first_row(), "max_batch_size: 4")


async def test_reshape_lets_clients_send_another_shape(tmp_path: Path) -> None:
    loaded = await opened(
        tmp_path,
        graphs.scale(2),
        """
        max_batch_size: 8
        input { name: "rows" data_type: TYPE_FP32 dims: [2, 2] reshape { shape: [4] } }
        output { name: "scaled" data_type: TYPE_FP32 dims: [2, 2] reshape { shape: [4] } }
        """,
    )
    assert shapes(loaded) == {"rows": ("batch", 2, 2), "scaled": ("batch", 2, 2)}
    assert (await answers(loaded, rows=np.ones((3, 2, 2), np.float32)))[0].shape == (3, 2, 2)
    await loaded.scheduler.close()


async def test_reshape_without_a_batch_is_to_exactly_its_axes(tmp_path: Path) -> None:
    loaded = await opened(
        tmp_path,
        graphs.identity("FP32", [1, 4]),
        """
        max_batch_size: 0
        input { name: "given" data_type: TYPE_FP32 dims: [2, 2] reshape { shape: [1, 4] } }
        output { name: "same" data_type: TYPE_FP32 dims: [4] reshape { shape: [1, 4] } }
        """,
    )
    assert shapes(loaded) == {"given": (2, 2), "same": (4,)}
    assert (await answers(loaded, given=np.arange(4, dtype=np.float32).reshape(2, 2)))[0].tolist() == [0, 1, 2, 3]
    await loaded.scheduler.close()


async def test_instances_share_the_cores_and_none_runs_on_the_loop(tmp_path: Path) -> None:
    loaded = await opened(tmp_path, graphs.scale(2), "instance_group { count: 2 kind: KIND_CPU }")
    assert loaded.config.instance_group[0].count == 2
    assert (await answers(loaded, rows=np.ones((1, 4), np.float32)))[1].tolist() == [[8]]
    await loaded.scheduler.close()


async def test_bf16_goes_in_and_comes_out(tmp_path: Path) -> None:
    loaded = await opened(tmp_path, graphs.identity("BF16", ["batch", 2]))
    given = np.array([[1.5, -2], [np.inf, 0]], ml_dtypes.bfloat16)
    (same,) = await answers(loaded, given=given)
    assert same.dtype == ml_dtypes.bfloat16
    assert same.tobytes() == given.tobytes()
    await loaded.scheduler.close()


async def test_declared_warm_up_rows_are_run(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "warmup" / "rows").write_bytes(np.zeros(1, np.int64).tobytes())
    config = """
        max_batch_size: 4
        model_warmup { name: "w" batch_size: 1 inputs { key: "index" value { data_type: TYPE_INT64 %s } } }
    """
    with pytest.raises(WrongStateError, match="Warm-up failed"):
        await opened(tmp_path, graphs.first_only(), config % 'input_data_file: "rows"')
    loaded = await opened(tmp_path, graphs.lookup(), config % "zero_data: true")
    await loaded.scheduler.close()
    with pytest.raises(WrongStateError, match="no plain file name"):
        await opened(tmp_path, graphs.lookup(), config % 'input_data_file: "../rows"')


async def test_an_opening_that_is_cancelled_ends_its_warm_up(tmp_path: Path) -> None:
    config = """
        max_batch_size: 4
        model_warmup { name: "w" count: 1000 inputs { key: "rows" value { data_type: TYPE_FP32 dims: [4] } } }
    """
    opening = asyncio.create_task(opened(tmp_path, graphs.slow(), config))
    await asyncio.sleep(0.3)
    opening.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(asyncio.CancelledError):
            await opening
        # Returns when no thread runs the model any more.
        await asyncio.get_running_loop().shutdown_default_executor()


WRONG = {
    "another datatype": ('input { name: "rows" data_type: TYPE_INT64 }', "says that 'rows' is INT64; the graph has"),
    "other dims": ('max_batch_size: 2 input { name: "rows" dims: [5] }', r"'rows' has dims \[5\]; the graph has"),
    "a batch axis in dims": ('max_batch_size: 2 input { name: "rows" dims: [-1, 4] }', "has dims"),
    "an unknown input": ('input { name: "row" }', r"lists the inputs \['row'\]; the graph has rows: FP32"),
    "an unknown output": ('output { name: "sum" }', r"lists the outputs \['sum'\]"),
    "an unknown backend": ('backend: "tensorflow"', "asks for backend 'tensorflow'; this server has onnxruntime"),
    "a preferred size above the greatest": (
        "max_batch_size: 4 dynamic_batching { preferred_batch_size: [2, 8] }",
        r"sizes from 1 to max_batch_size 4; got \[2, 8\]",
    ),
    "a preferred size of none": ("dynamic_batching { preferred_batch_size: [0] }", r"sizes from 1 .* got \[0\]"),
    "half of the padding": ('parameters { key: "pad_axis" value { string_value: "n" } }', "belong together"),
}


@pytest.mark.parametrize("case", WRONG)
async def test_a_configuration_that_does_not_fit_says_so(tmp_path: Path, case: str) -> None:
    config, message = WRONG[case]
    with pytest.raises(WrongStateError, match=message):
        await opened(tmp_path, graphs.scale(2), config)


@pytest.mark.parametrize("name", ["../2/model.onnx", "{outside}", "..", "2", "nothing.onnx"])
async def test_a_model_lies_in_its_versions_folder_whatever_the_configuration_says(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "2" / "model.onnx"
    outside.parent.mkdir()
    outside.write_bytes(graphs.scale(3).files["model.onnx"])
    with pytest.raises(WrongStateError, match=r"no plain name|There is no file"):
        await opened(tmp_path, graphs.scale(2), f'default_model_filename: "{name.format(outside=outside)}"')


async def test_a_file_of_another_name_is_opened_and_its_external_data_checked(tmp_path: Path) -> None:
    config = 'default_model_filename: "net.onnx"'
    for location, served in (("weights.bin", True), ("../weights.bin", False)):
        files = graphs.with_external_weight(location, np.full(4, 3, np.float32)).files
        (tmp_path / "weights.bin").write_bytes(files["weights.bin"])
        renamed = {"model.onnx": graphs.scale(2).files["model.onnx"], "net.onnx": files["model.onnx"]}
        bundle = graphs.Bundle({**renamed, "weights.bin": files["weights.bin"]}, graphs.scale(2).signature)
        if not served:
            with pytest.raises(WrongStateError, match=r"net.onnx has external data in '../weights.bin'"):
                await opened(tmp_path, bundle, config)
            continue
        loaded = await opened(tmp_path, bundle, config)
        assert (await answers(loaded, rows=np.ones((1, 4), np.float32)))[0].tolist() == [[3] * 4]
        await loaded.scheduler.close()


async def test_max_batch_size_needs_a_batch_axis(tmp_path: Path) -> None:
    with pytest.raises(WrongStateError, match="whose first axis is not dynamic"):
        await opened(tmp_path, graphs.identity("FP32", [2, 3]), "max_batch_size: 4")


async def test_padded_rows_answer_as_they_would_alone(tmp_path: Path) -> None:
    bundle = graphs.bundle_of(
        [helper.make_node("Relu", ["x"], ["y"])],
        [graphs.value("x", "FP32", ["batch", "sequence"])],
        [graphs.value("y", "FP32", ["batch", "sequence"])],
    )
    config = """
        parameters { key: "pad_axis" value { string_value: "sequence" } }
        parameters { key: "pad_buckets" value { string_value: "4,8" } }
    """
    loaded = await opened(tmp_path, bundle, config)
    for length in (1, 4, 5, 9):
        given = np.arange(length, dtype=np.float32)[np.newaxis]
        assert (await answers(loaded, x=given))[0].tolist() == given.tolist()
    await loaded.scheduler.close()


def padding(axis: str = "sequence", buckets: str = "4,8", **values: str) -> str:
    parameters = {
        "pad_axis": axis,
        "pad_buckets": buckets,
        **{f"pad_value:{name}": text for name, text in values.items()},
    }
    return "".join(
        f'parameters {{ key: "{key}" value {{ string_value: "{text}" }} }}' for key, text in parameters.items()
    )


def same(datatype: str, *axes: int | str) -> graphs.Bundle:
    return graphs.identity(datatype, ["batch", *axes])


NOT_PADDED = {
    "an axis that no input has": (same("FP32", "sequence"), padding("length"), "an input .* of sequence; got 'length'"),
    "no dynamic axis": (same("FP32", 3), padding(), "of which there is none; got 'sequence'"),
    "the batch": (same("FP32", "sequence"), padding("batch"), "other than 'batch'"),
    "no batch": (graphs.identity("FP32", [2, "sequence"]), padding(), "needs a model with a batch axis"),
    "text": (same("BYTES", "sequence"), padding(), "input 'given: BYTES .batch, sequence.', and text cannot be padded"),
    "an axis that stands twice": (same("FP32", "sequence", "sequence"), padding(), "stands twice in 'given: FP32"),
    "a value of no input": (same("FP32", "sequence"), padding(other="0"), "pad_value:other expected an input"),
    "a fraction": (same("INT32", "sequence"), padding(given="0.5"), "expected a value of INT32; got 0.5"),
    "a negative number": (same("UINT8", "sequence"), padding(given="-1"), "expected a value of UINT8; got -1"),
    "a large number": (same("INT64", "sequence"), padding(given="9223372036854775808"), "a value of INT64"),
    "no number": (same("INT32", "sequence"), padding(given="nan"), "expected a value of INT32; got nan"),
    "no truth": (same("BOOL", "sequence"), padding(given="2"), "expected a value of BOOL; got 2"),
    "a number of more bits": (same("FP16", "sequence"), padding(given="70000"), "expected a value of FP16; got 70000"),
    "too long": (
        same("FP32", "sequence"),
        f"max_batch_size: 16 {padding(buckets='8,1048577')}",
        "lengths of at most 1048576 with a max_batch_size of 16; got 1048577",
    ),
}


@pytest.mark.parametrize("case", NOT_PADDED)
async def test_padding_that_does_not_fit_the_model_fails_its_load(tmp_path: Path, case: str) -> None:
    bundle, config, message = NOT_PADDED[case]
    with pytest.raises(WrongStateError, match=message):
        await opened(tmp_path, bundle, config)


@pytest.mark.parametrize(
    ("datatype", "value"),
    [
        ("INT8", "-128"),
        ("UINT64", "1"),
        ("BOOL", "1"),
        ("FP16", "-inf"),
        ("FP32", "nan"),
        ("BF16", "0.1"),
        ("FP64", "1e300"),
    ],
)
async def test_padding_with_a_value_of_the_inputs_datatype_is_served(tmp_path: Path, datatype: str, value: str) -> None:
    loaded = await opened(tmp_path, same(datatype, "sequence"), padding(given=value))
    given = np.zeros((1, 3), loaded.signature.inputs["given"].datatype.dtype)
    assert (await answers(loaded, given=given))[0].tolist() == given.tolist()
    await loaded.scheduler.close()


async def test_a_model_that_cannot_be_scheduled_is_closed(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.py").write_text(
        f"class Model:\n"
        f"    def __init__(self, config): pass\n"
        f"    def infer(self, inputs, parameters): return inputs\n"
        f"    def close(self): open({str(tmp_path / 'closed')!r}, 'w').close()\n"
    )
    config = """
        backend: "python" max_batch_size: 4 dynamic_batching {}
        input { name: "x" data_type: TYPE_FP32 dims: [4] } output { name: "y" data_type: TYPE_FP32 dims: [4] }
    """
    parsed = text_format.Parse(f"{config} {padding()}", pb.ModelConfig())
    opener = ModelOpener(OPTIONS, 10, None, no_models)
    with pytest.raises(WrongStateError, match="of which there is none"):
        await opener.open(ModelFiles("m", 1, tmp_path / "1", parsed, None, {}, trusted=True))
    assert (tmp_path / "closed").exists()
