"""What ONNX Runtime makes of float16 on a CPU, and how a graph gets around it."""

import onnx

from penstock.converters.fusion.graph import Graph, attribute


def widen_transposes(graph: Graph) -> None:
    """A float16 Transpose that puts the batch behind others, in front of a MatMul -> the same in float32.

    ONNX Runtime 1.32 makes one node of the two, `FusedMatMul` with `transBatchA`, and its NCHWc optimizer ends the
    process as it loads it. The answers are the same: float32 has every number of float16.
    """
    for node in graph.nodes("Transpose"):
        moved, output = node.input[0], node.output[0]
        axes = list(attribute(node, "perm", []))
        puts_batch_behind = len(axes) > 2 and axes[-2:] == [0, len(axes) - 1]
        if (
            puts_batch_behind
            and graph.datatype(moved) == onnx.TensorProto.FLOAT16
            and any(reader.op_type == "MatMul" for reader in graph.readers(output))
        ):
            wide = graph.add("Cast", [moved], f"{node.name}/wide", to=onnx.TensorProto.FLOAT)
            transposed = graph.add("Transpose", [wide], f"{node.name}/transposed", perm=axes)
            graph.add("Cast", [transposed], node.name, output, to=onnx.TensorProto.FLOAT16)
