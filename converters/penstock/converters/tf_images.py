"""More of what `tf_operators` is for: images of other sizes."""

import numpy as np
from onnx import TensorProto
from tf2onnx.handler import tf_op
from tf2onnx.onnx_opset.nn import Resize

from penstock.converters.tf_operators import OPSET, Nodes, Replacement, translates


def _resizing(graph: Nodes, node: Nodes, **options: object) -> None:
    """To a size, not by a factor, whose rounding may lose a row of pixels. TensorFlow interpolates in float32."""
    new, output, is_cubic = Replacement(graph, node), node.output[0], node.type == "ResizeBicubic"
    if graph.get_dtype(node.input[0]) != graph.get_dtype(output):
        pixels = new("Cast", node.input[0], to=graph.get_dtype(output))
        graph.replace_inputs(node, [pixels, *node.input[1:]])
    Resize.version_11(graph, node, **options)
    transpose = graph.get_node_by_output(output)
    resize = transpose.inputs[0]
    size = new("Cast", new.inputs[1], to=TensorProto.INT64)
    pixels, regions, *_ = resize.input
    outer, inner = (new("Slice", new("Shape", pixels), *_range(new, start)) for start in (0, 2))
    shape = new("Concat", outer, size, axis=0)
    factors = new.constant([], np.float32)
    if is_cubic:
        # Each channel alone: ONNX Runtime moves the transposes behind the operator, which then refuses smaller sizes.
        plane = new.constant([-1, 1], np.int64)
        pixels = new("Reshape", pixels, new("Concat", plane, inner, axis=0))
        planes = new("Concat", new("Slice", new("Shape", pixels), *_range(new, 0)), size, axis=0)
        graph.replace_inputs(resize, [pixels, regions, factors, planes])
        graph.replace_inputs(transpose, [new("Reshape", resize.output[0], shape)])
    elif len(resize.input) == 3:
        graph.replace_inputs(resize, [pixels, regions, factors, shape])


def _range(new: Replacement, start: int) -> tuple[str, str]:
    """Of two axes."""
    return new.constant([start], np.int64), new.constant([start + 2], np.int64)


tf_op.register_handler(_resizing, OPSET, ["ResizeBilinear", "ResizeNearestNeighbor", "ResizeBicubic"], "", {})


@translates("ResizeArea")
def _area(_: Replacement, __: Nodes) -> None:
    """tf2onnx takes it for another."""
    raise ValueError("ONNX has no resizing by area")
