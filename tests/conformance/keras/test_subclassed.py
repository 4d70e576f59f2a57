from collections.abc import Callable
from pathlib import Path

import pytest

from penstock.converters import InvalidSamplesError, convert
from penstock.converters.conversion import _quiet_tensorflow

_quiet_tensorflow()
keras = pytest.importorskip("keras")

from tests.conformance.keras import subclassed  # noqa: E402 TensorFlow must find its settings
from tests.conformance.keras.case import Case, Model, Samples  # noqa: E402
from tests.conformance.keras.checks import check  # noqa: E402

TAGGED: Samples = {"words": subclassed.TOKENS, "bounds_0": subclassed.NUMBERS, "bounds_1": subclassed.NUMBERS}


@pytest.mark.parametrize("case", subclassed.CASES, ids=lambda case: case.name)
def test_converts_or_says_why_not(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


@pytest.mark.parametrize(
    ("build", "samples", "inputs", "outputs"),
    [
        (
            lambda: subclassed.called(subclassed.Classifier(), subclassed.NUMBERS),
            None,
            ["features FP32 [batch, 5]"],
            ["output FP32 [batch, 3]"],
        ),
        (
            lambda: subclassed.called(subclassed.Pair(), [subclassed.NUMBERS, subclassed.NUMBERS]),
            None,
            ["inputs FP32 [batch, 5]", "inputs_1 FP32 [batch, 5]"],
            ["output FP32 [batch, 5]", "output_1 FP32 [batch, 5]"],
        ),
        (
            subclassed.called_tagger,
            TAGGED,
            ["words INT32 [batch, 4]", "bounds_0 FP32 [batch, 5]", "bounds_1 FP32 [batch, 5]"],
            ["tag FP32 [batch, 2]", "parts_low FP32 [batch, 5]", "parts_high FP32 [batch, 5]", "read FP32 [batch, 3]"],
        ),
        (
            subclassed.Comparison,
            {"value": subclassed.NUMBERS, "query": subclassed.NUMBERS.astype("float64")},
            ["value FP32 [batch, 5]", "query FP32 [batch, 5]"],
            ["output FP32 [batch, 3]", "output_1 FP32 [batch, 3]"],
        ),
        (subclassed.built, None, ["steps FP32 [batch, sequence, 5]"], ["output FP32 [batch, sequence, 5]"]),
        (subclassed.built_sequential, None, ["input_layer FP32 [batch, 5]"], ["last FP32 [batch, 2]"]),
    ],
)
def test_names_order_and_datatypes(
    build: Callable[[], Model], samples: Samples | None, inputs: list[str], outputs: list[str], tmp_path: Path
) -> None:
    keras.utils.clear_session()
    signature = convert(build(), tmp_path / "model.onnx", samples=samples).signature
    assert [str(spec) for spec in signature.inputs] == inputs
    assert [str(spec) for spec in signature.outputs] == outputs


def test_samples_of_other_inputs_are_refused(tmp_path: Path) -> None:
    model = subclassed.called(subclassed.Classifier(), subclassed.NUMBERS)
    with pytest.raises(InvalidSamplesError, match="'features'"):
        convert(model, tmp_path / "model.onnx", samples={"x": subclassed.NUMBERS})
