"""More of what `tf_operators` is for: images of other sizes."""

import numpy as np
from onnx import TensorProto
from tf2onnx.handler import tf_op
from tf2onnx.onnx_opset.nn import Resize

from penstock.converters.tf_operators import OPSET, Nodes, Replacement, translates

_TABLE = 1024.0
"""TensorFlow rounds a position between two pixels to one part in so many, by which it looks its weights up."""
_CUBIC = -0.5
"""The parameter of Keys' kernel: R. Keys, Cubic convolution interpolation for digital image processing (1981)."""


def _resizing(graph: Nodes, node: Nodes, **options: object) -> None:
    """To a size, not by a factor, whose rounding may lose a row of pixels. TensorFlow interpolates in float32."""
    new, output = Replacement(graph, node), node.output[0]
    if graph.get_dtype(node.input[0]) != graph.get_dtype(output):
        pixels = new("Cast", node.input[0], to=graph.get_dtype(output))
        graph.replace_inputs(node, [pixels, *node.input[1:]])
    Resize.version_11(graph, node, **options)
    resize = graph.get_node_by_output(output).inputs[0]
    if len(resize.input) == 3:
        pixels, regions, _ = resize.input
        start, end = (new.constant([number], np.int64) for number in (0, 2))
        outer = new("Slice", new("Shape", pixels), start, end)
        sizes = new("Concat", outer, new("Cast", new.inputs[1], to=TensorProto.INT64), axis=0)
        graph.replace_inputs(resize, [pixels, regions, new.constant([], np.float32), sizes])


tf_op.register_handler(_resizing, OPSET, ["ResizeBilinear", "ResizeNearestNeighbor"], "", {})


@translates("ResizeBicubic")
def _bicubic(new: Replacement, node: Nodes) -> None:
    """Four weighted rows for each row, and four columns: ONNX Runtime's own knows no table, and fails at some sizes."""
    if not node.get_attr_value("half_pixel_centers", default=False) or node.get_attr_value("align_corners", default=0):
        raise ValueError("bicubic resizing is translated with half_pixel_centers only, as Keras has it")
    pixels = new("Cast", new.inputs[0], to=TensorProto.FLOAT)
    sizes = new("Cast", new.inputs[1], to=TensorProto.INT64)
    for axis in (1, 2):
        index = (new.constant(axis, np.int64), new.constant(axis - 1, np.int64))
        taken, made = new("Gather", new("Shape", pixels), index[0]), new("Gather", sizes, index[1])
        parts = [
            new("Mul", new("Gather", pixels, place, axis=axis), new("Reshape", weight, _along(new, axis)))
            for place, weight in _neighbours(new, taken, made)
        ]
        pixels = _sum(new, parts)
    new.becomes(pixels)


def _along(new: Replacement, axis: int) -> str:
    """The shape of weights for an axis of images: rows, height, width, channels."""
    return new.constant([-1 if place == axis else 1 for place in range(4)], np.int64)


def _neighbours(new: Replacement, taken: str, made: str) -> list[tuple[str, str]]:
    """Where the four pixels are that one is made of, and their weights; those outside of the image have none."""

    def number(value: float) -> str:
        return new.constant(value, np.float32)

    zero, one, last = new.constant(0, np.int64), new.constant(1, np.int64), new("Sub", taken, new.constant(1, np.int64))
    scale = new("Div", *(new("Cast", size, to=TensorProto.FLOAT) for size in (taken, made)))
    pixel = new("Cast", new("Range", zero, made, one), to=TensorProto.FLOAT)
    position = new("Sub", new("Mul", new("Add", pixel, number(0.5)), scale), number(0.5))
    before = new("Floor", position)
    offset = new("Div", new("Round", new("Mul", new("Sub", position, before), number(_TABLE))), number(_TABLE))
    places, weights = [], []
    for step in (-1, 0, 1, 2):
        place = new("Cast", new("Add", before, number(step)), to=TensorProto.INT64)
        inside = new("Max", new("Min", place, last), zero)
        weight = _keys(new, new("Abs", new("Sub", offset, number(step))), is_near=step in {0, 1})
        places.append(inside)
        weights.append(new("Where", new("Equal", place, inside), weight, number(0)))
    total = _sum(new, weights)
    return [(place, new("Div", weight, total)) for place, weight in zip(places, weights, strict=True)]


def _keys(new: Replacement, distance: str, *, is_near: bool) -> str:
    """The weight at a distance of at most one, or of one to two."""
    a = _CUBIC
    value = new.constant(a + 2 if is_near else a, np.float32)
    for coefficient in (-(a + 3), 0, 1) if is_near else (-5 * a, 8 * a, -4 * a):
        value = new("Add", new("Mul", value, distance), new.constant(coefficient, np.float32))
    return value


def _sum(new: Replacement, tensors: list[str]) -> str:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = new("Add", total, tensor)
    return total


@translates("ResizeArea")
def _area(_: Replacement, __: Nodes) -> None:
    """tf2onnx takes it for another."""
    raise ValueError("ONNX has no resizing by area")
