"""Models that are ONNX already: what is cleaned, what is refused, what is written."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from penstock.converters import ConversionError, GateError, UnsafeFileError, convert, inspect, verify, writing
from penstock.converters.parity import SkippedRows


def model_of(nodes: list[onnx.NodeProto], *initializers: onnx.TensorProto, **fields: Any) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "by hand",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3])],
        initializers,
    )
    versions = [helper.make_opsetid("", 18), helper.make_opsetid("ai.onnx.ml", 3)]
    return helper.make_model(graph, ir_version=10, opset_imports=versions, **fields)


def linear(*more: onnx.NodeProto) -> onnx.ModelProto:
    weights = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    return model_of(
        [helper.make_node("MatMul", ["x", "keras_tensor_1__7"], ["y"], name="product"), *more],
        onnx.numpy_helper.from_array(weights, "keras_tensor_1__7"),
    )


def saved(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "source.onnx"
    path.write_bytes(model.SerializeToString())
    return path


def test_dead_ends_go_and_names_stay(tmp_path: Path) -> None:
    model = linear(helper.make_node("Relu", ["y"], ["nobody"], name="dead"))
    model.graph.initializer.append(helper.make_tensor("unused", TensorProto.FLOAT, [1], [0.0]))
    helper.set_model_props(model, {"labels": "a,b,c"})
    conversion = convert(saved(model, tmp_path), tmp_path / "out.onnx")
    found = onnx.load(tmp_path / "out.onnx")
    assert [node.name for node in found.graph.node] == ["product"]
    assert [constant.name for constant in found.graph.initializer] == ["keras_tensor_1__7"]
    assert [(entry.key, entry.value) for entry in found.metadata_props] == [("labels", "a,b,c")]
    assert [str(spec) for spec in conversion.signature.outputs] == ["y FP32 [N, 3]"]
    assert {case.rows for case in conversion.parity.cases} == {"random", "extreme", "empty"}
    assert conversion.parity.skipped == (SkippedRows("nan", "the source answers with no number"),)


def test_what_only_training_needs_goes(tmp_path: Path) -> None:
    model = linear()
    model.training_info.add().algorithm.CopyFrom(with_external_data("../secret").graph)
    convert(saved(model, tmp_path), tmp_path / "out.onnx")
    assert b"secret" not in (tmp_path / "out.onnx").read_bytes()


def test_functions_are_written_out(tmp_path: Path) -> None:
    convert(with_functions({"Twice": "Once"}), tmp_path / "out.onnx")
    found = onnx.load(tmp_path / "out.onnx")
    assert [node.op_type for node in found.graph.node] == ["MatMul", "Add", "Add"]
    assert not found.functions
    assert {entry.domain for entry in found.opset_import} == {""}


def test_shapes_that_the_file_leaves_open(tmp_path: Path) -> None:
    model = linear()
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = -1
    signature = convert(saved(model, tmp_path), tmp_path / "out.onnx").signature
    assert [str(spec) for spec in (*signature.inputs, *signature.outputs)] == [
        "x FP32 [x_axis_0, 4]",
        "y FP32 [y_axis_0, 3]",
    ]


def test_a_choice_of_opset(tmp_path: Path) -> None:
    assert convert(linear(), tmp_path / "out.onnx", opset=20).opset == 20
    assert onnx.load(tmp_path / "out.onnx").opset_import[0].version == 20


def test_verify_tells_a_model_from_another(tmp_path: Path) -> None:
    source = saved(linear(), tmp_path)
    assert verify(linear(), source).max_absolute_error == 0.0
    other = linear()
    other.graph.initializer[0].CopyFrom(onnx.numpy_helper.from_array(np.ones((4, 3), np.float32), "keras_tensor_1__7"))
    with pytest.raises(GateError, match="'y' differs from the source on 1 random rows: in row 0"):
        verify(other, source)


def with_external_data(location: str) -> onnx.ModelProto:
    model = linear()
    tensor = model.graph.initializer[0]
    onnx.external_data_helper.set_external_data(tensor, location, offset=0, length=48)
    tensor.ClearField("raw_data")
    return model


def outside(folder: Path) -> Path:
    (folder / "weights.bin").write_bytes(bytes(48))
    (folder / "inner").mkdir()
    return saved(with_external_data("../weights.bin"), folder / "inner")


def absolute(folder: Path) -> Path:
    (folder / "weights.bin").write_bytes(bytes(48))
    return saved(with_external_data(str(folder / "weights.bin")), folder)


def linked(folder: Path) -> Path:
    (folder / "secret").write_bytes(bytes(48))
    (folder / "weights.bin").symlink_to(folder / "secret")
    return saved(with_external_data("weights.bin"), folder)


def missing(folder: Path) -> Path:
    return saved(with_external_data("weights.bin"), folder)


def too_short(folder: Path) -> Path:
    (folder / "weights.bin").write_bytes(bytes(8))
    return saved(with_external_data("weights.bin"), folder)


def linked_twice(folder: Path) -> Path:
    (folder / "secret").write_bytes(bytes(48))
    (folder / "weights.bin").hardlink_to(folder / "secret")
    return saved(with_external_data("weights.bin"), folder)


def sparse_outside(folder: Path) -> Path:
    (folder / "weights.bin").write_bytes(bytes(48))
    (folder / "inner").mkdir()
    model = linear()
    sparse = model.graph.sparse_initializer.add(dims=[4, 3])
    sparse.values.CopyFrom(with_external_data("../weights.bin").graph.initializer[0])
    return saved(model, folder / "inner")


def crowded(folder: Path) -> Path:
    model = linear()
    model.graph.initializer.extend(TensorProto(name=f"w{count}", data_type=1) for count in range(60_000))
    return saved(model, folder)


def truncated(folder: Path) -> Path:
    path = saved(linear(), folder)
    path.write_bytes(path.read_bytes()[:-20])
    return path


def unknown_domain(folder: Path) -> Path:
    model = model_of([helper.make_node("Steal", ["x"], ["y"], domain="evil.example")])
    model.opset_import.append(helper.make_opsetid("evil.example", 1))
    return saved(model, folder)


def inner_unknown_domain(folder: Path) -> Path:
    body = helper.make_graph(
        [helper.make_node("Steal", ["x"], ["inner"], domain="evil.example")],
        "body",
        [],
        [helper.make_tensor_value_info("inner", TensorProto.FLOAT, None)],
    )
    condition = helper.make_tensor("yes", TensorProto.BOOL, [], [True])
    node = helper.make_node("If", ["yes"], ["y"], then_branch=body, else_branch=body)
    return saved(model_of([node], condition), folder)


def endless(folder: Path) -> Path:
    names = ["x", *(f"t{index}" for index in range(99_999)), "y"]
    nodes = [helper.make_node("Relu", [a], [b]) for a, b in itertools.pairwise(names)]
    return saved(model_of(nodes), folder)


def calling_itself(folder: Path) -> Path:
    return saved(with_functions({"Twice": "Twice"}), folder)


def doubled_forty_times(folder: Path) -> Path:
    names = ["Twice", *(f"Twice{count}" for count in range(40))]
    return saved(with_functions(dict(itertools.pairwise(names))), folder)


def with_functions(calls: dict[str, str]) -> onnx.ModelProto:
    """Each calls the next one two times; the last adds."""
    functions = [
        helper.make_function(
            "mine",
            name,
            ["a"],
            ["c"],
            [
                helper.make_node(called, ["a"], ["b"], domain="mine"),
                helper.make_node(called, ["b"], ["c"], domain="mine"),
            ],
            [helper.make_opsetid("mine", 1)],
        )
        for name, called in calls.items()
    ]
    versions = [helper.make_opsetid("", 18)]
    last = [name for name in dict.fromkeys(calls.values()) if name not in calls]
    functions += [
        helper.make_function("mine", name, ["a"], ["b"], [helper.make_node("Add", ["a", "a"], ["b"])], versions)
        for name in last
    ]
    model = linear(helper.make_node("Twice", ["y"], ["z"], domain="mine"))
    model.graph.output[0].name = "z"
    model.opset_import.append(helper.make_opsetid("mine", 1))
    model.functions.extend(functions)
    return model


HOSTILE: list[tuple[Callable[[Path], Path], str]] = [
    (outside, "external-data"),
    (absolute, "external-data"),
    (missing, "external-data"),
    (too_short, "external-data"),
    (linked, "no-links"),
    (linked_twice, "no-links"),
    (sparse_outside, "external-data"),
    (crowded, "constant-count"),
    (truncated, "protobuf"),
    (unknown_domain, "known-domains"),
    (inner_unknown_domain, "known-domains"),
    (endless, "node-count"),
    (doubled_forty_times, "node-count"),
    (calling_itself, "functions"),
]


@pytest.mark.parametrize(("build", "rule"), HOSTILE, ids=[case[0].__name__ for case in HOSTILE])
def test_hostile_files(build: Callable[[Path], Path], rule: str, tmp_path: Path) -> None:
    path = build(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    started = time.monotonic()
    for read in (lambda: convert(path, path.parent / "out.onnx"), lambda: inspect(path)):
        with pytest.raises(UnsafeFileError, match=rf"\(rule: {rule}\)") as caught:
            read()
        assert caught.value.rule == rule
    assert time.monotonic() - started < 10
    assert sorted(tmp_path.rglob("*")) == before


def test_external_data_beside_the_model_is_read(tmp_path: Path) -> None:
    weights = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    (tmp_path / "weights.bin").write_bytes(weights.tobytes())
    convert(saved(with_external_data("weights.bin"), tmp_path), tmp_path / "out.onnx")
    assert verify(tmp_path / "out.onnx", linear()).max_absolute_error == 0.0


def large() -> onnx.ModelProto:
    weights = np.random.default_rng(1).standard_normal((4, 3)).astype(np.float32)
    wide = np.concatenate([np.eye(4, dtype=np.float32)] * 100, axis=1)
    return model_of(
        [
            helper.make_node("MatMul", ["x", "wide"], ["many"]),
            helper.make_node("MatMul", ["many", "back"], ["few"]),
            helper.make_node("MatMul", ["few", "weights"], ["y"]),
        ],
        onnx.numpy_helper.from_array(wide, "wide"),
        onnx.numpy_helper.from_array(wide.T / 100, "back"),
        onnx.numpy_helper.from_array(weights, "weights"),
    )


def test_large_weights_get_a_file_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "EXTERNAL_ABOVE_BYTES", 4_000)
    conversion = convert(large(), tmp_path / "out.onnx")
    assert conversion.data is not None
    assert sorted(tmp_path.iterdir()) == sorted([conversion.data, conversion.path])
    assert conversion.size_bytes == sum(path.stat().st_size for path in tmp_path.iterdir())
    assert inspect(conversion.path).external_data == (conversion.data.name,)
    x = np.ones((2, 4), np.float32)
    (answer,) = onnxruntime.InferenceSession(conversion.path).run(None, {"x": x})
    np.testing.assert_allclose(answer, x @ onnx.numpy_helper.to_array(large().graph.initializer[2]), rtol=1e-5)
    again = convert(onnx.load(conversion.path), tmp_path / "again.onnx")
    assert again.data is not None
    assert again.data.read_bytes() == conversion.data.read_bytes()


def test_a_graph_that_cannot_be_written_leaves_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writing, "EXTERNAL_ABOVE_BYTES", 4_000)
    target = tmp_path / "out.onnx"
    target.write_bytes(b"old")

    def full(*_: object) -> writing.Written:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writing, "_write_graph", full)
    with pytest.raises(ConversionError, match="No space left"):
        writing.write(target, large())
    assert [(path, path.read_bytes()) for path in tmp_path.iterdir()] == [(target, b"old")]


def test_inspection(tmp_path: Path) -> None:
    model = linear(helper.make_node("Relu", ["y"], ["nobody"]))
    helper.set_model_props(model, {"labels": "a,b,c"})
    path = saved(model, tmp_path)
    found = inspect(path)
    assert found.operators == {"MatMul": 1, "Relu": 1}
    assert found.parameter_count == 12
    assert found.size_bytes == path.stat().st_size
    assert found.opsets == {"ai.onnx": 18, "ai.onnx.ml": 3}
    assert found.metadata == {"labels": "a,b,c"}
    assert ("CPUExecutionProvider", None) in [(provider.name, provider.refusal) for provider in found.providers]


def test_what_was_written_elsewhere_is_put_in_place_with_its_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "EXTERNAL_ABOVE_BYTES", 4_000)
    elsewhere, here = tmp_path / "elsewhere", tmp_path / "here"
    elsewhere.mkdir()
    here.mkdir()
    made = convert(large(), elsewhere / "out.onnx")
    assert made.data is not None
    (here / "out.onnx").mkdir()  # no file can take its place
    with pytest.raises(ConversionError, match="Cannot write"):
        writing.place(here / "out.onnx", made.path, made.data)
    assert [path.name for path in here.iterdir()] == ["out.onnx"]
    (here / "out.onnx").rmdir()
    writing.place(here / "out.onnx", made.path, made.data)
    for path in (made.path, made.data):
        assert (here / path.name).read_bytes() == path.read_bytes()
    assert len(list(here.iterdir())) == 2
