"""Rewrites of a graph into fewer, faster operators with the same answers.

Each pass looks for one pattern and leaves alone what it is not certain of. Passes build on those before them.
"""

from collections.abc import Callable

import onnx

from penstock.converters.fusion.activations import fuse_gelu
from penstock.converters.fusion.attention import fuse_attention, fuse_product_attention
from penstock.converters.fusion.convolutions import fuse_batch_normalization, fuse_scaled_convolution
from penstock.converters.fusion.graph import Graph
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

PASSES: tuple[Callable[[Graph], None], ...] = (
    fold_constants,
    fuse_layer_normalization,
    fuse_rms_normalization,
    fuse_gelu,
    fuse_mean_pooling,
    fuse_batch_normalization,
    fuse_scaled_convolution,
    fuse_tensordot,
    fuse_einsum,
    fuse_sizes,
    fuse_bias,
    fuse_attention,
    fuse_product_attention,
    fuse_transposes,
    fuse_sizes,
    fuse_reshapes,
)


def optimize(model: onnx.ModelProto) -> onnx.ModelProto:
    """A faster graph with the same inputs, outputs and answers; the given one stays as it is.

    What ONNX Runtime does itself as it loads a graph is left to it. Attention and GELU become operators of ONNX Runtime
    (`com.microsoft`); everything else is of the ONNX version of the model. Optimizing twice changes nothing more.
    """
    graph = Graph(model)
    graph.renew()  # what only dead ends read would seem to be needed
    for fuse in PASSES:
        fuse(graph)
        if graph.has_changed:
            graph.renew()
    return graph.finish()
