"""What scales or shifts the channels of a convolution, batch normalization above all, as a part of its weights."""

from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from penstock.converters.fusion.graph import Graph, attribute


def fuse_batch_normalization(graph: Graph) -> None:
    """BatchNormalization(Conv(x, w, b), γ, β, μ, σ²) -> Conv(x, s · w, s · (b - μ) + β) with s = γ / √(σ² + ε)."""
    for node in graph.nodes("BatchNormalization"):
        convolution = graph.made_by(node.input[0], "Conv")
        is_training = attribute(node, "training_mode", 0) or len(node.output) > 1
        if convolution is None or is_training or not graph.is_only_for(node.input[0], node):
            continue
        weight, *numbers = (graph.constant(tensor) for tensor in (convolution.input[1], *node.input[1:]))
        bias = graph.constant(convolution.input[2]) if len(convolution.input) > 2 else np.float64(0)
        if weight is None or bias is None or any(number is None for number in numbers):
            continue
        gamma, beta, mean, variance = (np.asarray(number, np.float64) for number in numbers)
        scale = gamma / np.sqrt(variance + attribute(node, "epsilon", 1e-5))
        scaled = weight * scale.reshape(-1, *[1] * (weight.ndim - 1))
        shifted = (bias - mean) * scale + beta
        inputs = [
            convolution.input[0],
            graph.add_constant(scaled, f"{node.name}/weight", weight.dtype),
            graph.add_constant(shifted, f"{node.name}/bias", weight.dtype),
        ]
        graph.copy(convolution, inputs, node.output[0])


def fuse_scaled_convolution(graph: Graph) -> None:
    """Conv(x, w, b) · s -> Conv(x, s · w, s · b); Conv(x, w, b) + s -> Conv(x, w, b + s)."""
    for node in graph.nodes("Mul", "Add"):
        for convolved, other in graph.operands(node):
            convolution = graph.made_by(convolved, "Conv")
            number = graph.constant(other)
            if convolution is None or number is None or not graph.is_only_for(convolved, node):
                continue
            folded = _folded(graph, convolution, number, is_scale=node.op_type == "Mul")
            if folded is not None:
                weight, bias = folded
                inputs = [
                    convolution.input[0],
                    graph.add_constant(weight, f"{node.name}/weight"),
                    graph.add_constant(bias, f"{node.name}/bias"),
                ]
                graph.copy(convolution, inputs, node.output[0])
                break


def _folded(
    graph: Graph, convolution: onnx.NodeProto, number: NDArray[Any], *, is_scale: bool
) -> tuple[NDArray[Any], NDArray[Any]] | None:
    """The weights [channels, …] and the bias [channels]; None if they or the numbers, one a channel, are unknown."""
    weight = graph.constant(convolution.input[1])
    if weight is None or number.dtype != weight.dtype:
        return None
    channels = len(weight)
    bias = graph.constant(convolution.input[2]) if len(convolution.input) > 2 else np.zeros(channels, weight.dtype)
    places = weight.ndim - 2
    shape = (1,) * (places + 2 - number.ndim) + number.shape
    if bias is None or len(shape) != places + 2 or shape[0] != 1 or shape[2:] != (1,) * places:
        return None
    each = np.broadcast_to(number.reshape(-1), channels) if shape[1] in {1, channels} else None
    if each is None:
        return None
    if is_scale:
        return weight * each.reshape(-1, *[1] * (weight.ndim - 1)), bias * each
    return weight, bias + each
