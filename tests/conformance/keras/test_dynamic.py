from pathlib import Path

import pytest

from penstock.converters import convert
from penstock.converters.conversion import _quiet_tensorflow

_quiet_tensorflow()
keras = pytest.importorskip("keras")
layers = keras.layers

from tests.conformance.keras.case import Case  # noqa: E402 TensorFlow must find its settings
from tests.conformance.keras.checks import check  # noqa: E402
from tests.conformance.keras.dynamic import CASES  # noqa: E402


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_converts_or_says_why_not(case: Case, tmp_path: Path) -> None:
    check(case, tmp_path)


def test_nested_structures_of_any_size_keep_names_and_order(tmp_path: Path) -> None:
    keras.utils.clear_session()
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    series, features = keras.Input((None, 4)), keras.Input((3,))
    words = layers.GlobalAveragePooling1D()(layers.Embedding(5, 4)(tokens))
    read = layers.Bidirectional(layers.GRU(2))(series)
    model = keras.Model(
        {"tokens": tokens, "more": {"series": [series, features]}},
        {"words": words, "also": [layers.Concatenate()([read, features]), {"inner": layers.Dense(2)(words)}]},
    )
    signature = convert(model, tmp_path / "model.onnx").signature
    assert [str(spec) for spec in signature.inputs] == [
        "tokens INT32 [batch, tokens_sequence]",
        "more_series_0 FP32 [batch, more_series_0_sequence, 4]",
        "more_series_1 FP32 [batch, 3]",
    ]
    assert [str(spec) for spec in signature.outputs] == [
        "words FP32 [batch, 4]",
        "also_0 FP32 [batch, 7]",
        "also_1_inner FP32 [batch, 2]",
    ]
