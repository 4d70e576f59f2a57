"""Layer and RMS normalization, as Keras and TensorFlow spell them out."""

import numpy as np
import onnx

from penstock.converters.fusion.graph import Graph, attribute


def fuse_layer_normalization(graph: Graph) -> None:
    """X · g + (b − mean · g), with g = γ / sqrt(variance + ε), on the last axis -> LayerNormalization(x, γ, b)."""
    for node in graph.nodes("Add"):
        for scaled, shifted in graph.operands(node):
            product, offset, bias = graph.made_by(scaled, "Mul"), shifted, None
            summed = graph.made_by(shifted, "Add")
            if summed is not None:
                bias = next((other for one, other in graph.operands(summed) if graph.made_by(one, "Mul")), None)
                offset = next((one for one, _ in graph.operands(summed) if graph.made_by(one, "Mul")), shifted)
            mean_product = graph.made_by(offset, "Mul")
            if product is None or mean_product is None:
                continue
            found = _normalized(graph, product, mean_product)
            width = graph.shape(found[0]) if found else None
            if found and width and isinstance(width[-1], int) and graph.has_rank_of(node.output[0], found[0]):
                rows, gamma, epsilon = found
                scale = _vector(graph, gamma, width[-1], f"{node.name}/scale", default=1.0)
                shift = _vector(graph, bias, width[-1], f"{node.name}/bias", default=0.0)
                if scale is not None and shift is not None:
                    graph.add(
                        "LayerNormalization",
                        [rows, scale, shift],
                        node.name,
                        node.output[0],
                        axis=-1,
                        epsilon=epsilon,
                    )
                    break


def fuse_rms_normalization(graph: Graph) -> None:
    """X · (γ / sqrt(mean(x · x) + ε)) -> (x / sqrt(mean(x ^ 2) + ε)) · γ, which ONNX Runtime fuses as it loads.

    ONNX itself has an operator for it only since opset 23.
    """
    for node in graph.nodes("Mul"):
        for rows, factor in graph.operands(node):
            scaled = _scaled(graph, factor)
            if scaled is None:
                continue
            deviation, gamma = scaled
            square = _mean_of(graph, deviation[0])
            product = graph.made_by(square, "Mul") if square else None
            shape = graph.shape(rows)
            if product is None or list(product.input) != [rows, rows] or not shape or not isinstance(shape[-1], int):
                continue
            scale = _vector(graph, gamma, shape[-1], f"{node.name}/scale", default=1.0)
            if scale is None or square is None or not graph.has_rank_of(node.output[0], rows):
                continue
            name = node.name
            squared = graph.add("Pow", [rows, graph.add_constant(2.0, f"{name}/two", np.float32)], f"{name}/square")
            axes = graph.add_constant([-1], f"{name}/axes", np.int64)
            mean = graph.add("ReduceMean", [squared, axes], f"{name}/mean", keepdims=1)
            epsilon = graph.add_constant(deviation[1], f"{name}/epsilon", np.float32)
            root = graph.add("Sqrt", [graph.add("Add", [mean, epsilon], f"{name}/add")], f"{name}/sqrt")
            graph.add("Mul", [graph.add("Div", [rows, root], f"{name}/div"), scale], name, node.output[0])
            break


def _normalized(graph: Graph, product: onnx.NodeProto, shift: onnx.NodeProto) -> tuple[str, str | None, float] | None:
    """The rows, γ (None if there is none) and ε of x · g and −mean · g."""
    for rows, factor in graph.operands(product):
        for negated, other in graph.operands(shift):
            negation, scaled = graph.made_by(negated, "Neg"), _scaled(graph, factor)
            if negation is None or scaled is None or other != factor:
                continue
            (variance, epsilon), gamma = scaled
            mean = negation.input[0]
            squared = _mean_of(graph, variance)
            square = graph.made_by(squared, "Mul") if squared else None
            centred = graph.made_by(square.input[0], "Sub") if square is not None else None
            if (
                square is not None
                and centred is not None
                and square.input[0] == square.input[1]
                and list(centred.input) == [rows, mean]
                and _mean_of(graph, mean) == rows
            ):
                return rows, gamma, epsilon
    return None


def _scaled(graph: Graph, factor: str) -> tuple[tuple[str, float], str | None] | None:
    """((v, ε), γ) of γ / sqrt(v + ε), or of 1 / sqrt(v + ε) with γ None."""
    gamma = None
    product = graph.made_by(factor, "Mul")
    if product is not None:
        for one, other in graph.operands(product):
            if graph.made_by(one, "Reciprocal") is not None and graph.constant(other) is not None:
                factor, gamma = one, other
    inverse = graph.made_by(factor, "Reciprocal")
    root = graph.made_by(inverse.input[0], "Sqrt") if inverse is not None else None
    total = graph.made_by(root.input[0], "Add") if root is not None else None
    if total is None:
        return None
    for variance, other in graph.operands(total):
        epsilon = graph.constant(other)
        if epsilon is not None and epsilon.size == 1 and epsilon.dtype == np.float32:
            return (variance, float(epsilon.item())), gamma
    return None


def _mean_of(graph: Graph, tensor: str) -> str | None:
    """What a tensor is the mean of over the last axis, which stays as an axis of one."""
    mean = graph.made_by(tensor, "ReduceMean")
    if mean is None or attribute(mean, "keepdims", 1) != 1:
        return None
    axes = graph.constant(mean.input[1]) if len(mean.input) > 1 else attribute(mean, "axes")
    shape = graph.shape(mean.input[0])
    if axes is None or shape is None or len(axes) != 1 or axes[0] not in {-1, len(shape) - 1}:
        return None
    return str(mean.input[0])


def _vector(graph: Graph, tensor: str | None, width: int, name: str, default: float) -> str | None:
    """A constant of one value for each element of the last axis, as a vector; None if it is another."""
    if tensor is None:
        return graph.add_constant(np.full(width, default), name, np.float32)
    values = graph.constant(tensor)
    if values is None or values.dtype != np.float32 or values.size != width or values.shape[-1:] != (width,):
        return None
    return tensor if values.ndim == 1 else graph.add_constant(values.reshape(-1), name)
