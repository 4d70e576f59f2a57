"""Products with a constant matrix, in the form that ONNX Runtime fuses with what stands around them: one MatMul.

TensorFlow writes a Dense layer on three axes as Reshape, MatMul, Reshape, with ten nodes that compute the shapes;
an EinsumDense layer is an Einsum, or the same three where all sizes are known, and its bias is not flat.
"""

from collections.abc import Sequence
from math import prod

import numpy as np
import onnx

from penstock.converters.fusion.graph import Graph, Shape, attribute


def fold_constants(graph: Graph) -> None:
    """Reshape(weight) and Transpose(weight) -> the weight in that shape.

    A weight that others read as it is, such as an embedding that is the last product's, too, is not written twice.
    """
    for node in graph.nodes("Reshape", "Transpose"):
        weight = graph.constant(node.input[0])
        if weight is None or not graph.is_inner(node.output[0]):
            continue
        if node.op_type == "Transpose":
            if any(reader.op_type != "Transpose" for reader in graph.readers(node.input[0])):
                continue
            folded = weight.transpose(attribute(node, "perm"))
        else:
            sizes = graph.constant(node.input[1])
            # Where a size is zero, the operator takes that of its input.
            if sizes is None or not sizes.all():
                continue
            folded = weight.reshape(sizes)
        graph.redirect(node.output[0], graph.add_constant(folded, node.name))


def fuse_tensordot(graph: Graph) -> None:
    """Reshape(MatMul(Reshape(x, [-1, k]), w), [*sizes of x before k, *columns of w]) -> MatMul(x, w), reshaped."""
    for node in graph.nodes("Reshape"):
        product = graph.made_by(node.input[0], "MatMul")
        flat = graph.made_by(product.input[0], "Reshape") if product is not None else None
        if product is None or flat is None or not graph.is_only_for(product.output[0], node):
            continue
        rows, weight, sizes = flat.input[0], graph.constant(product.input[1]), graph.constant(flat.input[1])
        shape = graph.shape(rows)
        if weight is None or weight.ndim != 2 or sizes is None or list(sizes) != [-1, len(weight)] or shape is None:
            continue
        before = _axes_before(shape, len(weight))
        columns = _columns(graph, node.input[1], rows, before, weight.shape[1]) if before else None
        if before and columns:
            _write(graph, rows, product.input[1], len(weight), before, len(shape), columns, node)


def fuse_einsum(graph: Graph) -> None:
    """Einsum("ab…c, c…d -> ab…d") with a constant -> MatMul(x, w), reshaped."""
    for node in graph.nodes("Einsum"):
        weight = graph.constant(node.input[1]) if len(node.input) == 2 else None
        if weight is None:
            continue
        left, right, out = _terms(node)
        inner = [label for label in right if label in left]
        outer = [label for label in right if label not in left]
        before = left[: len(left) - len(inner)]
        labels = [*before, *inner, *outer]
        is_product = (left, right, out) == ([*before, *inner], [*inner, *outer], [*before, *outer])
        if is_product and inner and outer and before and len(set(labels)) == len(labels) and "." not in labels:
            columns = weight.shape[len(inner) :]
            matrix = weight.reshape(-1, prod(columns))
            flat = graph.add_constant(matrix, node.input[1])
            _write(graph, node.input[0], flat, len(matrix), len(before), len(left), columns, node)


def fuse_sizes(graph: Graph) -> None:
    """Reshape(x, [-1, 8, n, h]) -> Reshape(x, [0, 0, n, h]) where that keeps the first axes, so that others see it."""
    for node in graph.nodes("Reshape"):
        sizes, shape = graph.constant(node.input[1]), graph.shape(node.input[0])
        if sizes is None or shape is None or attribute(node, "allowzero", 0) or 0 in sizes:
            continue
        kept = next((count for count in range(len(sizes) - 1, 0, -1) if _keeps(shape, sizes.tolist(), count)), 0)
        if kept:
            zeros = _kept(graph, kept, sizes[kept:].tolist(), node.name)
            graph.add("Reshape", [node.input[0], zeros], node.name, node.output[0])


def _keeps(shape: Shape, sizes: list[int], count: int) -> bool:
    """Whether the first axes are the same; a −1 among them is, if all that stands behind them is as large as before."""
    behind = [size for size in shape[count:] if isinstance(size, int)]
    return (
        len(shape) > count
        and len(behind) == len(shape) - count
        and min(sizes[count:]) > 0
        and prod(behind) == prod(sizes[count:])
        and all(size in {known, -1} for size, known in zip(sizes[:count], shape, strict=False))
        and sizes.count(-1) <= 1
    )


def fuse_bias(graph: Graph) -> None:
    """Add(Reshape(x, [0, 0, n, h]), b[n, h]) -> Reshape(Add(x, b[n · h]), [0, 0, n, h])."""
    for node in graph.nodes("Add"):
        for reshaped, other in graph.operands(node):
            reshape, bias = graph.made_by(reshaped, "Reshape"), graph.constant(other)
            sizes = graph.constant(reshape.input[1]) if reshape is not None else None
            if reshape is None or bias is None or sizes is None or not graph.is_only_for(reshaped, node):
                continue
            kept = len(sizes) - bias.ndim
            shape = graph.shape(reshape.input[0])
            splits_last = shape is not None and len(shape) == kept + 1 and not any(sizes[:kept])
            if splits_last and bias.ndim > 1 and tuple(sizes[kept:]) == bias.shape:
                flat = graph.add_constant(bias.reshape(-1), other)
                total = graph.add("Add", [reshape.input[0], flat], node.name)
                graph.add("Reshape", [total, reshape.input[1]], reshape.name, node.output[0])
                break


def fuse_reshapes(graph: Graph) -> None:
    """Reshape(Reshape(x, [0, 0, n, h]), [0, 0, n · h]) -> x."""
    for node in graph.nodes("Reshape"):
        split = graph.made_by(node.input[0], "Reshape")
        if split is None or not graph.is_inner(node.output[0]):
            continue
        sizes, parts, shape = (
            graph.constant(node.input[1]),
            graph.constant(split.input[1]),
            graph.shape(split.input[0]),
        )
        if (
            sizes is None
            or parts is None
            or shape is None
            or any(attribute(one, "allowzero", 0) for one in (node, split))
        ):
            continue
        kept = len(sizes) - 1
        if (
            len(shape) == kept + 1
            and not any(sizes[:kept])
            and not any(parts[:kept])
            and all(part > 0 for part in parts[kept:])
            and shape[-1] == prod(parts[kept:].tolist())
            and sizes[-1] in {-1, shape[-1]}
        ):
            graph.redirect(node.output[0], split.input[0])


def fuse_transposes(graph: Graph) -> None:
    """Transpose(Transpose(x)) -> Transpose(x), or x."""
    for node in graph.nodes("Transpose"):
        first = graph.made_by(node.input[0], "Transpose")
        before, then = (attribute(one, "perm") for one in (first, node)) if first is not None else (None, None)
        if first is None or before is None or then is None:
            continue
        both = [before[axis] for axis in then]
        if both != sorted(both):
            graph.add("Transpose", [first.input[0]], node.name, node.output[0], perm=both)
        elif graph.is_inner(node.output[0]):
            graph.redirect(node.output[0], first.input[0])


def _write(
    graph: Graph,
    rows: str,
    weight: str,
    height: int,
    before: int,
    rank: int,
    columns: Sequence[int],
    replaced: onnx.NodeProto,
) -> None:
    """MatMul of the rows, whose axes behind the first `before` are the weight's `height` rows, in place of a node."""
    name = replaced.name
    if rank > before + 1:
        rows = graph.add("Reshape", [rows, _kept(graph, before, [height], name)], f"{name}/rows")
    if len(columns) == 1:
        graph.add("MatMul", [rows, weight], name, replaced.output[0])
    else:
        product = graph.add("MatMul", [rows, weight], name)
        graph.add("Reshape", [product, _kept(graph, before, columns, name)], f"{name}/columns", replaced.output[0])


def _kept(graph: Graph, before: int, sizes: Sequence[int], name: str) -> str:
    """The sizes of a Reshape that leaves the first axes as they are: a zero says so."""
    return graph.add_constant([*[0] * before, *sizes], f"{name}/sizes", np.int64)


def _axes_before(shape: Shape, size: int) -> int:
    """How many axes stand before those that have `size` elements together; 0 if there are none, or just rows."""
    total = 1
    for axis in range(len(shape) - 1, 0, -1):
        length = shape[axis]
        if not isinstance(length, int):
            return 0
        total *= length
        if total == size:
            return axis if len(shape) > 2 else 0
    return 0


def _columns(graph: Graph, tensor: str, rows: str, before: int, width: int) -> list[int] | None:
    """The last sizes of a Reshape of `width` elements, if the first are the first `before` of the tensor `rows`."""
    shape = (graph.shape(rows) or ())[:before]
    tensor = _uncast(graph, tensor)
    sizes = graph.constant(tensor)
    if sizes is not None:
        last = sizes[before:].tolist()
        # A single −1 is found out from the others, which are those of the rows.
        is_same = len(last) > 0 and all(
            size == known or (size == -1 and list(sizes).count(-1) == 1)
            for size, known in zip(sizes[:before], shape, strict=True)
        )
        return last if is_same and prod(last) == width and min(last) > 0 else None
    joined = graph.made_by(tensor, "Concat")
    if joined is None or len(joined.input) != 2:
        return None
    chosen, last_sizes = graph.made_by(_uncast(graph, joined.input[0]), "Gather"), graph.constant(joined.input[1])
    axes = graph.constant(chosen.input[1]) if chosen is not None else None
    measured = graph.made_by(_uncast(graph, chosen.input[0]), "Shape") if chosen is not None else None
    if axes is None or axes.tolist() != list(range(before)) or last_sizes is None or measured is None:
        return None
    is_of_rows = measured.input[0] == rows and not measured.attribute
    return [width] if is_of_rows and last_sizes.tolist() == [width] else None


def _uncast(graph: Graph, tensor: str) -> str:
    """Sizes are cast to and fro between int32 and int64, which changes none of them."""
    cast = graph.made_by(tensor, "Cast")
    is_whole = cast is not None and attribute(cast, "to") in {onnx.TensorProto.INT32, onnx.TensorProto.INT64}
    return _uncast(graph, cast.input[0]) if cast is not None and is_whole else tensor


def _terms(node: onnx.NodeProto) -> tuple[list[str], list[str], list[str]]:
    inputs, _, out = attribute(node, "equation").decode().replace(" ", "").partition("->")
    left, _, right = inputs.partition(",")
    return list(left), list(right), list(out)
