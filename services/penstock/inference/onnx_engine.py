"""The engine on ONNX Runtime."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime

from penstock.inference.signature import Signature, Tensor
from penstock.inference.tensors import Array
from penstock.rpc.errors import PenstockError, WrongStateError

_DATATYPES = {
    "tensor(bool)": "BOOL",
    "tensor(uint8)": "UINT8",
    "tensor(uint16)": "UINT16",
    "tensor(uint32)": "UINT32",
    "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8",
    "tensor(int16)": "INT16",
    "tensor(int32)": "INT32",
    "tensor(int64)": "INT64",
    "tensor(float16)": "FP16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

# Faults are raised as exceptions and logged by us; the runtime's own lines would stand beside them without context.
_FATAL = 4


class OnnxEngine:
    """An `Engine` over one inference session on the CPU."""

    def __init__(self, model: Path, signature: Signature, threads: int) -> None:
        """Opens `model`, external data beside it. Blocks.

        Raises `WrongStateError` if ONNX Runtime refuses the file or the graph has another signature than the version.
        """
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL
        # Threads that spin between runs take the cores from the event loop and from other models.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise WrongStateError(
                f"ONNX Runtime {onnxruntime.__version__} cannot open model.onnx: "
                f"{_brief(error).replace(str(model), model.name)}"
            ) from error
        problems = [
            *_differences("input", session.get_inputs(), signature.inputs.values()),
            *_differences("output", session.get_outputs(), signature.outputs.values()),
        ]
        if problems:
            raise WrongStateError(f"model.onnx differs from the version's signature: {'; '.join(problems)}.")
        self._session: Any = session

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        run_options = onnxruntime.RunOptions()
        run_options.log_severity_level = _FATAL
        try:
            answers: list[Array] = self._session.run(outputs, inputs, run_options)
        except Exception as error:
            raise PenstockError(f"The model could not compute these inputs: {_brief(error)}") from error
        return answers

    def close(self) -> None:
        self._session = None


def _differences(kind: str, nodes: Sequence[Any], tensors: Iterable[Tensor]) -> list[str]:
    """What tells the graph's inputs or outputs from the signature's; their order counts."""
    graph = [f"{node.name}: {_DATATYPES.get(node.type, node.type)} {_axes(node.shape)}" for node in nodes]
    wanted = list(tensors)
    if len(wanted) == len(nodes) and all(map(_agrees, nodes, wanted)):
        return []
    return [f"expected {kind}s {', '.join(map(str, wanted))}; the graph has {', '.join(graph) or 'none'}"]


def _agrees(node: Any, tensor: Tensor) -> bool:  # noqa: ANN401  # onnxruntime.NodeArg publishes no type
    return (
        node.name == tensor.name
        and _DATATYPES.get(node.type) == tensor.datatype.name
        and len(node.shape) == len(tensor.shape)
        and all(_axis_agrees(axis, wanted) for axis, wanted in zip(node.shape, tensor.shape, strict=True))
    )


def _axis_agrees(axis: int | str | None, wanted: int | str) -> bool:
    """The graph may leave a dynamic axis without a name; where it gives one, the signature's is the same."""
    return isinstance(wanted, str) if axis is None else axis == wanted


def _axes(shape: Sequence[int | str | None]) -> str:
    return f"[{', '.join('?' if axis is None else str(axis) for axis in shape)}]"


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
