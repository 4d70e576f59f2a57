"""Backbones of KerasHub, small and with random weights. `make check-hub` installs what they need."""

from pathlib import Path
from typing import Any

import pytest

from penstock.converters import convert
from penstock.converters.conversion import _quiet_tensorflow

_quiet_tensorflow()
keras = pytest.importorskip("keras")
hub = pytest.importorskip("keras_hub", reason="KerasHub is not installed: it brings TensorFlow Text").models

TEXT = {"vocabulary_size": 30, "num_layers": 2, "num_heads": 2, "hidden_dim": 8, "intermediate_dim": 16}
RESNET = {
    "input_conv_filters": [64],
    "input_conv_kernel_sizes": [7],
    "stackwise_num_filters": [64, 16],
    "stackwise_num_blocks": [1, 1],
    "stackwise_num_strides": [1, 2],
    "image_shape": (None, None, 3),
}
# KerasHub's own T5 loses a mask.
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*was passed an input with a mask attached to it:UserWarning")
VIT = {
    "image_shape": (32, 32, 3),
    "patch_size": (8, 8),
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 8,
    "mlp_dim": 16,
}


@pytest.mark.parametrize(
    ("name", "options", "inputs", "outputs"),
    [
        (
            "BertBackbone",
            {**TEXT, "max_sequence_length": 64},
            ["token_ids", "segment_ids", "padding_mask"],
            ["sequence_output", "pooled_output"],
        ),
        ("GPT2Backbone", {**TEXT, "max_sequence_length": 64}, ["token_ids", "padding_mask"], None),
        ("ResNetBackbone", {**RESNET, "block_type": "basic_block"}, None, None),
        ("ViTBackbone", VIT, None, None),
        (
            "T5Backbone",
            TEXT,
            ["encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask"],
            ["encoder_sequence_output", "decoder_sequence_output"],
        ),
        (
            "BartBackbone",
            {**TEXT, "max_sequence_length": 64},
            ["encoder_token_ids", "encoder_padding_mask", "decoder_token_ids", "decoder_padding_mask"],
            ["encoder_sequence_output", "decoder_sequence_output"],
        ),
    ],
)
def test_a_backbone(
    name: str, options: dict[str, Any], inputs: list[str] | None, outputs: list[str] | None, tmp_path: Path
) -> None:
    keras.utils.clear_session()
    keras.utils.set_random_seed(7)
    signature = convert(getattr(hub, name)(**options), tmp_path / "model.onnx").signature
    if inputs is not None:
        assert sorted(spec.name for spec in signature.inputs) == sorted(inputs)
    if outputs is not None:
        assert sorted(spec.name for spec in signature.outputs) == sorted(outputs)
