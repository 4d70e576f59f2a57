"""Convolutions in every number of dimensions, with strides, dilations, groups and their transposes."""

from keras import layers
from tests.conformance.keras.case import Case, around

CASES = [
    Case("Conv1D", lambda: around(layers.Conv1D(4, 3, padding="causal", dilation_rate=2), (None, 3))),
    Case("Conv1D (groups)", lambda: around(layers.Conv1D(4, 3, groups=2), (9, 6))),
    Case("Conv1DTranspose", lambda: around(layers.Conv1DTranspose(4, 3, strides=2, padding="same"), (7, 3))),
    Case("Conv2D", lambda: around(layers.Conv2D(4, 3, strides=2, padding="same"), (None, None, 3))),
    Case("Conv2D (dilated)", lambda: around(layers.Conv2D(4, 3, dilation_rate=2), (12, 12, 3))),
    Case("Conv2D (groups)", lambda: around(layers.Conv2D(4, 3, groups=2), (9, 9, 6))),
    Case("Conv2DTranspose", lambda: around(layers.Conv2DTranspose(4, 3, strides=2, padding="same"), (7, 7, 3))),
    Case(
        "Conv2DTranspose (output_padding)",
        lambda: around(layers.Conv2DTranspose(4, 3, strides=2, output_padding=1), (7, 6, 3)),
    ),
    Case(
        "Conv2DTranspose (same, output_padding)",
        lambda: around(layers.Conv2DTranspose(4, 3, strides=2, padding="same", output_padding=1), (7, 6, 3)),
    ),
    Case("Conv2DTranspose (any size)", lambda: around(layers.Conv2DTranspose(4, 3, strides=2), (None, None, 3))),
    Case("Conv3D", lambda: around(layers.Conv3D(2, 3, padding="same"), (5, 6, 7, 3))),
    Case("Conv3D (groups)", lambda: around(layers.Conv3D(4, 3, groups=2), (5, 6, 7, 4))),
    Case("Conv3DTranspose", lambda: around(layers.Conv3DTranspose(2, 3, strides=2, padding="same"), (4, 5, 6, 3))),
    Case("DepthwiseConv1D", lambda: around(layers.DepthwiseConv1D(3, depth_multiplier=2), (9, 3))),
    Case("DepthwiseConv2D", lambda: around(layers.DepthwiseConv2D(3, strides=2, padding="same"), (9, 9, 3))),
    Case("SeparableConv1D", lambda: around(layers.SeparableConv1D(4, 3), (9, 3))),
    Case("SeparableConv2D", lambda: around(layers.SeparableConv2D(4, 3, padding="same"), (9, 9, 3))),
]
