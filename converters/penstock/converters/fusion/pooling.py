"""Means over an image, which TensorFlow takes with its channels last, as ONNX's pooling with its channels first.

ONNX Runtime keeps images in blocks of channels from convolution to convolution, and takes such a mean of those, too.
"""

import onnx

from penstock.converters.fusion.graph import Graph, attribute

_POOLED = {onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16}
"""ONNX Runtime pools nothing else on a CPU."""


def fuse_mean_pooling(graph: Graph) -> None:
    """The mean of Transpose(x) over height and width -> GlobalAveragePool(x)."""
    for node in graph.nodes("ReduceMean"):
        transpose = graph.made_by(node.input[0], "Transpose")
        images = transpose.input[0] if transpose is not None else None
        shape = graph.shape(images) if images else None
        if transpose is None or images is None or shape is None or len(shape) < 3:
            continue
        last = [0, *range(2, len(shape)), 1]
        if attribute(transpose, "perm") != last or _axes(graph, node, len(shape)) != set(range(1, len(shape) - 1)):
            continue
        if graph.datatype(images) not in _POOLED:
            continue
        pooled = graph.add("GlobalAveragePool", [images], f"{node.name}/pooled")
        if attribute(node, "keepdims", 1):
            graph.add("Transpose", [pooled], node.name, node.output[0], perm=last)
        else:
            graph.add("Flatten", [pooled], node.name, node.output[0], axis=1)
            _drop_reshapes(graph, node.output[0], pooled, shape[1], len(shape))


def _axes(graph: Graph, node: onnx.NodeProto, rank: int) -> set[int]:
    axes = graph.constant(node.input[1]) if len(node.input) > 1 else attribute(node, "axes")
    return set() if axes is None else {int(axis) % rank for axis in axes}


def _drop_reshapes(graph: Graph, flat: str, pooled: str, channels: int | str | None, rank: int) -> None:
    """What gives the mean its axes of one back is the mean before it lost them."""
    for reader in graph.readers(flat):
        shape = graph.shape(reader.output[0])
        is_undone = shape is not None and isinstance(channels, int) and shape[1:] == (channels, *[1] * (rank - 2))
        if reader.op_type == "Reshape" and is_undone and graph.is_inner(reader.output[0]):
            graph.redirect(reader.output[0], pooled)
