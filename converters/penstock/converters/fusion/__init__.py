"""Rewrites of a graph into fewer, faster operators with the same answers.

Each pass looks for one pattern and leaves alone what it is not certain of. Passes build on those before them.
"""

from collections.abc import Callable

import onnx

from penstock.converters.fusion.activations import fuse_gelu
from penstock.converters.fusion.attention import fuse_attention, fuse_product_attention
from penstock.converters.fusion.convolutions import fuse_batch_normalization, fuse_scaled_convolution
from penstock.converters.fusion.graph import Graph
from penstock.converters.fusion.half_precision import widen_transposes
from penstock.converters.fusion.normalization import fuse_layer_normalization, fuse_rms_normalization
from penstock.converters.fusion.pooling import fuse_mean_pooling
from penstock.converters.fusion.products import (
    fold_constants,
    fuse_bias,
    fuse_einsum,
    fuse_reshapes,
    fuse_sizes,
    fuse_tensordot,
    fuse_transposes,
)
from penstock.converters.fusion.sizes import fold_sizes
from penstock.converters.opset import opset_of

PASSES: tuple[tuple[Callable[[Graph], None], int], ...] = (
    (fold_constants, 1),
    (fold_sizes, 1),
    (fuse_layer_normalization, 17),
    (fuse_rms_normalization, 18),
    (fuse_gelu, 1),
    (fuse_mean_pooling, 1),
    (fuse_batch_normalization, 1),
    (fuse_scaled_convolution, 1),
    (fuse_tensordot, 1),
    (fuse_einsum, 1),
    (fuse_sizes, 1),
    (fuse_bias, 1),
    (fuse_attention, 15),
    (fuse_product_attention, 15),
    (fuse_transposes, 1),
    (fuse_sizes, 1),
    (fuse_reshapes, 1),
    (fold_sizes, 1),
    (widen_transposes, 1),
)
"""Each with the opset from which on there are the operators that it writes, and those it reads mean what it takes them
for."""


def optimize(model: onnx.ModelProto) -> onnx.ModelProto:
    """A faster graph with the same inputs, outputs and answers; the given one stays as it is.

    What ONNX Runtime does itself as it loads a graph is left to it. Attention and GELU become operators of ONNX Runtime
    (`com.microsoft`); everything else is of the ONNX version of the model, so that one of an old version is changed
    less: LayerNormalization is there since opset 17. Optimizing twice changes nothing more.
    """
    graph = Graph(model)
    graph.renew()  # what only dead ends read would seem to be needed
    for fuse, opset in PASSES:
        if opset_of(model) < opset:
            continue
        fuse(graph)
        if graph.has_changed:
            graph.renew()
    return graph.finish()
