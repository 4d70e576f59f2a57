"""Other forms of a graph: what is in them, what they cost, and which one is chosen."""

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from penstock.api.types.v1.parity_pb2 import ParityReport as ParityMessage
from penstock.converters import (
    AccuracyBound,
    ConversionError,
    InvalidSamplesError,
    Variant,
    VariantError,
    VariantMeasurement,
    convert,
    quantize,
    read_signature,
)
from penstock.converters.runtime import Runtime
from penstock.converters.variants import FORMS, Form, fastest, judged

WIDE, DEEP = 64, 96


def perceptron(*, scale: float = 1.0, layers: int = 2, width: int = WIDE) -> onnx.ModelProto:
    """Products with a bias and Relu, the last one a Gemm with its weight transposed, then Softmax."""
    random = np.random.default_rng(7)
    nodes, constants, tensor = [], [], "rows"
    for layer in range(layers):
        weight = (scale * random.standard_normal((width, width)) / np.sqrt(width)).astype(np.float32)
        constants += [
            numpy_helper.from_array(weight, f"weight_{layer}"),
            numpy_helper.from_array(random.standard_normal(width).astype(np.float32), f"bias_{layer}"),
        ]
        nodes += [
            helper.make_node("MatMul", [tensor, f"weight_{layer}"], [f"product_{layer}"], f"product_{layer}"),
            helper.make_node("Add", [f"product_{layer}", f"bias_{layer}"], [f"sum_{layer}"], f"sum_{layer}"),
            helper.make_node("Relu", [f"sum_{layer}"], [f"hidden_{layer}"], f"hidden_{layer}"),
        ]
        tensor = f"hidden_{layer}"
    head = (random.standard_normal((10, width)) / np.sqrt(width)).astype(np.float32)
    constants += [
        numpy_helper.from_array(head, "head"),
        numpy_helper.from_array(np.linspace(-1, 1, 10, dtype=np.float32), "head_bias"),
    ]
    nodes += [
        helper.make_node("Gemm", [tensor, "head", "head_bias"], ["logits"], "logits", transB=1),
        helper.make_node("Softmax", ["logits"], ["scores"], "scores", axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "perceptron",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 10])],
        constants,
    )
    return helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])


def rows(count: int = 40, width: int = WIDE) -> dict[str, NDArray[np.float32]]:
    return {"rows": np.random.default_rng(1).standard_normal((count, width)).astype(np.float32)}


def answers(model: onnx.ModelProto, folder: Path) -> NDArray[np.float32]:
    onnx.save(model, folder / "answering.onnx")
    with Runtime(folder / "answering.onnx") as runtime:
        return runtime.answer(rows())["scores"]


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


# What each form has that the graph has not, and how far its probabilities may be off.
EXPECTED: dict[Form, tuple[dict[str, int], float]] = {
    "fp16": ({"Cast": 2}, 1e-2),
    "int8": ({"MatMulInteger": 3}, 3e-2),
    "int8-static": ({"DequantizeLinear": 6}, 3e-2),
    "int4": ({"MatMulNBits": 3}, 1e-1),
    "pruned": ({"MatMul": 2, "Gemm": 1}, 1.0),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form(form: Form, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = perceptron()
    before = model.SerializeToString(deterministic=True)
    made = quantize(model, form, rows=rows())
    found, (added, error) = operators(made), EXPECTED[form]
    assert all(found[name] >= count for name, count in added.items()), found
    assert np.abs(answers(made, tmp_path) - answers(model, tmp_path)).max() < error
    assert read_signature(made) == read_signature(model)
    onnx.checker.check_model(made, full_check=True)
    assert made.SerializeToString(deterministic=True) == quantize(model, form, rows=rows()).SerializeToString(
        deterministic=True
    )
    assert not made.metadata_props
    assert not caplog.records
    assert model.SerializeToString(deterministic=True) == before


def test_half_precision_leaves_what_it_cannot_hold() -> None:
    model = perceptron()
    weight = numpy_helper.to_array(model.graph.initializer[0]).copy()
    weight[3, 3] = 1e5
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "weight_0"))
    kept = {item.name: item.data_type for item in quantize(model, "fp16").graph.initializer}
    assert kept["weight_0"] == TensorProto.FLOAT
    assert kept["weight_1"] == kept["head"] == TensorProto.FLOAT16


@pytest.mark.parametrize("share", [0.25, 0.5, 0.9])
def test_pruning_zeroes_the_smallest(share: float) -> None:
    model = perceptron()
    before = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    after = {
        item.name: numpy_helper.to_array(item) for item in quantize(model, "pruned", sparsity=share).graph.initializer
    }
    for name in ("weight_0", "weight_1", "head"):
        gone = after[name] == 0
        assert gone.sum() == int(share * gone.size)
        assert np.abs(before[name][gone]).max() <= np.abs(before[name][~gone]).min()
        assert np.array_equal(before[name][~gone], after[name][~gone])
    assert np.array_equal(before["bias_0"], after["bias_0"])


@pytest.mark.parametrize("depth", [32, 40, 96])
def test_int4_is_within_a_step(depth: int, tmp_path: Path) -> None:
    """Asked with rows of the identity, it answers with its weight; a step is an eighth of its block's largest."""
    weight = np.random.default_rng(3).standard_normal((depth, 5)).astype(np.float32)
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["rows", "weight"], ["product"], "product")],
        "product",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", depth])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(weight, "weight")],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    onnx.save(quantize(model, "int4"), tmp_path / "int4.onnx")
    with Runtime(tmp_path / "int4.onnx") as runtime:
        found = runtime.answer({"rows": np.eye(depth, dtype=np.float32)})["product"]
    for start in range(0, depth, 32):
        block = np.abs(weight[start : start + 32])
        steps = block.max(axis=0) / 8
        # What is opposite the largest and as large is cut to 7 steps of 8; rows in 8 bits are within a hundredth.
        assert (np.abs(found - weight)[start : start + 32] <= steps + 0.01 * block).all()


@pytest.mark.parametrize(
    ("form", "options", "error", "message"),
    [
        ("int8-static", {}, InvalidSamplesError, "int8-static needs rows"),
        ("int8-static", {"rows": {"other": np.ones((2, WIDE))}}, InvalidSamplesError, "needed for the inputs"),
        ("int8-static", {"rows": {"rows": np.ones((0, WIDE))}}, InvalidSamplesError, "at least one"),
        ("int9", {}, ConversionError, "There is no variant 'int9'"),
        ("pruned", {"sparsity": 1.0}, ValueError, r"between 0 and 1.*it is 1\.0"),
    ],
)
def test_refusals(form: Form, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        quantize(perceptron(), form, **options)


def test_variants_are_a_list(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="a list of names; got the text 'int8'"):
        convert(perceptron(), tmp_path / "model.onnx", variants="int8")  # type: ignore[arg-type]


@pytest.mark.parametrize("form", FORMS)
def test_a_graph_without_weights_has_no_other_form(form: Form) -> None:
    graph = helper.make_graph(
        [helper.make_node("Relu", ["rows"], ["scores"], "relu")],
        "relu",
        [helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["batch", WIDE])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", WIDE])],
    )
    model = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 18)])
    with pytest.raises(ConversionError, match=f"nothing that would be another as {form}"):
        quantize(model, form, rows=rows())


def variant(
    name: str,
    latency: float,
    size: int,
    error: float = 0.0,
    agreement: float = 1.0,
    *,
    batch: float | None = None,
    classes: bool = False,
) -> Variant:
    found = VariantError("scores", classes, error, error, error, agreement)
    return Variant(name, VariantMeasurement((found,), latency, latency if batch is None else batch, size))


FP32 = variant("fp32", 100, 1000)
# Variants beside fp32, the reasons for those that are dropped, and which is chosen.
CHOICES: dict[str, tuple[list[Variant], dict[str, str], str]] = {
    "the fastest": ([variant("int8", 50, 300), variant("int4", 60, 200)], {}, "int8"),
    "the most accurate of the fastest": (
        [variant("int8", 50, 300, error=0.02), variant("int4", 54, 200, error=0.01)],
        {},
        "int4",
    ),
    "fp32 alone": ([], {}, "fp32"),
    "slower": ([variant("fp16", 150, 500)], {"fp16": "slower: 0.67 ×"}, "fp32"),
    "slower on a batch": ([variant("int8", 50, 300, batch=150)], {"int8": "slower: 0.67 ×"}, "fp32"),
    "smaller but not faster beyond noise": ([variant("int4", 95, 200)], {}, "fp32"),
    "larger": ([variant("int8", 50, 1200)], {"int8": "larger: 1.20 ×"}, "fp32"),
    "no gain": ([variant("pruned", 95, 1000)], {"pruned": "no gain"}, "fp32"),
    "too far": ([variant("int8", 50, 300, error=0.06)], {"int8": "too inaccurate: the relative error"}, "fp32"),
    "other classes": (
        [variant("int8", 50, 300, agreement=0.98, classes=True)],
        {"int8": "too inaccurate: the class of 'scores' is the source's on 98.00%"},
        "fp32",
    ),
    "classes may be far": ([variant("int8", 50, 300, error=0.5, agreement=1.0, classes=True)], {}, "int8"),
    "an argmax that is no class": ([variant("int8", 50, 300, error=0.01, agreement=0.5)], {}, "int8"),
    "beaten": (
        [variant("int8", 50, 300, error=0.02), variant("int4", 60, 300, error=0.03)],
        {"int4": "beaten: int8"},
        "int8",
    ),
    "equal ones both stay": ([variant("int8", 50, 300), variant("int4", 50, 300)], {}, "int8"),
    "the inaccurate beats nobody": (
        [variant("int8", 10, 100, error=1.0), variant("int4", 60, 300, error=0.01)],
        {"int8": "too inaccurate"},
        "int4",
    ),
    "not possible": ([Variant("int8", None, "not possible: no")], {"int8": "not possible: no"}, "fp32"),
}


@pytest.mark.parametrize("case", CHOICES)
def test_choice(case: str) -> None:
    others, reasons, chosen = CHOICES[case]
    table = judged([FP32, *others], AccuracyBound())
    dropped = {found.name: found.dropped for found in table if found.dropped}
    assert dropped.keys() == reasons.keys()
    assert all(dropped[name].startswith(reason) for name, reason in reasons.items()), dropped
    assert fastest(table) == chosen


def test_never_a_slower_one() -> None:
    random = np.random.default_rng(5)
    for _ in range(300):
        others = [
            variant(name, *random.uniform(50, 200, 1), int(random.integers(100, 1500)), random.uniform(0, 0.1))
            for name in FORMS
        ]
        table = judged([FP32, *others], AccuracyBound())
        chosen = next(found for found in table if found.name == fastest(table))
        assert chosen.measurement is not None
        assert not chosen.dropped
        assert chosen.name == "fp32" or chosen.measurement.row_latency_us * 1.1 <= 100


@pytest.mark.parametrize("bound", [{"argmax_agreement": 1.1}, {"relative_error": float("nan")}])
def test_bounds_are_shares_and_numbers(bound: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="it is"):
        AccuracyBound(**bound)


def test_convert_writes_what_was_asked_for(tmp_path: Path) -> None:
    """Wide enough that int4 and int8 are a quarter of the bytes, whatever else the machine does."""
    target = tmp_path / "model.onnx"
    model = perceptron(width=512)
    conversion = convert(model, target, variants=["int4", "int8-static", "pruned"], bound=AccuracyBound(0.0, 1.0))
    report = conversion.parity.variants
    assert report is not None
    assert [found.name for found in report.variants] == ["fp32", "int4", "int8-static", "pruned"]
    assert report.chosen == "fp32"
    reasons = {found.name: found.dropped for found in report.variants}
    assert reasons["int8-static"].startswith("not possible: int8-static needs rows")
    assert reasons["pruned"]
    assert conversion.variant_files.keys() == set(report.kept) - {"fp32"}
    assert {path.name for path in tmp_path.iterdir()} == {
        "model.onnx",
        *(f"model.{name}.onnx" for name in conversion.variant_files),
    }
    assert report.row_count == 42
    assert report.batch_size == 32
    plain = convert(model, tmp_path / "plain.onnx")
    assert plain.sha256 == conversion.sha256
    assert plain.parity.variants is None
    message = ParityMessage(**asdict(conversion.parity))
    assert message.variants.variants[1].name == "int4"
    assert message.variants.variants[1].measurement.errors[0].is_classification
    assert not message.variants.variants[2].HasField("measurement")


def test_automatic_choice_is_one_file_of_a_kept_variant(tmp_path: Path) -> None:
    conversion = convert(perceptron(), tmp_path / "model.onnx", samples=rows(), auto=True)
    report = conversion.parity.variants
    assert report is not None
    assert [found.name for found in report.variants] == ["fp32", *FORMS]
    assert report.row_count == 40
    assert report.chosen in set(report.kept)
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]
    chosen = next(found.measurement for found in report.variants if found.name == report.chosen)
    assert chosen is not None
    assert chosen.size_bytes == conversion.size_bytes


def test_too_strict_a_bound_drops_for_accuracy(tmp_path: Path) -> None:
    conversion = convert(
        perceptron(scale=4.0), tmp_path / "model.onnx", variants=["int4"], auto=True, bound=AccuracyBound(1.0, 0.0)
    )
    report = conversion.parity.variants
    assert report is not None
    assert report.variants[1].dropped.startswith("too inaccurate: the class of 'scores'")
    assert report.chosen == "fp32"
    assert not conversion.variant_files


def test_an_unknown_variant(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match=r"no variant 'int3'\. Variants are fp16, int8"):
        convert(perceptron(), tmp_path / "model.onnx", variants=["int3"])  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())
