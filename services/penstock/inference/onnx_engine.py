"""The engine on ONNX Runtime."""

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime

from penstock.inference.engine import Stop
from penstock.inference.signature import Signature
from penstock.inference.tensors import BF16, Array
from penstock.rpc.errors import InvalidFieldError, PenstockError, WrongStateError

DATATYPES = {
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
    "tensor(bfloat16)": "BF16",
    "tensor(float)": "FP32",
    "tensor(double)": "FP64",
    "tensor(string)": "BYTES",
}

# Faults are raised as exceptions and logged by us; the runtime's own lines would stand beside them without context.
_FATAL = 4

# Microseconds; from 20 to 200 a lone run takes the same, and two models at once lose more and more.
_SPIN_US = "20"

# TensorProto.BFLOAT16 of onnx.proto.
_ONNX_BF16 = 16


@dataclass(frozen=True)
class GraphTensor:
    """An input or output as the graph declares it. An axis is a size, a name, or nothing. `datatype` may be unknown."""

    name: str
    datatype: str
    axes: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.name}: {self.datatype} [{', '.join('?' if axis is None else str(axis) for axis in self.axes)}]"


@dataclass(frozen=True)
class SessionPlan:
    """How sessions are opened and used: threads of one run, and execution providers in order of preference.

    `needs_elements` refuses empty inputs, on which some kernels end the process.
    """

    threads: int
    providers: tuple[str, ...]
    needs_elements: bool = False


class OnnxStop:
    """Ends a run through its options, which ONNX Runtime looks at between two nodes. Runs begun later end at once."""

    def __init__(self) -> None:
        self.options = _run_options()
        self.stopped = False

    def stop(self) -> None:
        self.options.terminate = True
        self.stopped = True


class OnnxEngine:
    """An `Engine` over one inference session."""

    def __init__(self, model: Path, plan: SessionPlan) -> None:
        """Opens `model`, external data beside it. Blocks. Raises `WrongStateError` if ONNX Runtime refuses the file."""
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = plan.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _FATAL
        # Within a run, threads that sleep at every operator's end cost 5 % of a lone run; threads that wait awake for
        # long cost a third of what two models at once could do. Between runs nobody may wait awake.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.intra_op.spin_duration_us", _SPIN_US)
        try:
            session = onnxruntime.InferenceSession(model, options, providers=list(plan.providers))
        except Exception as error:
            raise WrongStateError(
                f"ONNX Runtime {onnxruntime.__version__} cannot open {model.name}: "
                f"{_brief(error).replace(str(model), model.name)}"
            ) from error
        self.inputs = [_graph_tensor(node) for node in session.get_inputs()]
        self.outputs = [_graph_tensor(node) for node in session.get_outputs()]
        self.providers: list[str] = session.get_providers()
        self._session: Any = session
        self._options = _run_options()
        self._needs_elements = plan.needs_elements
        # Shapes without the batch axis, if there is one.
        self._reshaped_inputs: dict[str, tuple[int, ...]] = {}
        self._reshaped_outputs: dict[str, tuple[int, ...]] = {}
        self._batched = False
        # numpy's bindings to ONNX Runtime know no BF16.
        self._by_value = any(tensor.datatype == BF16.name for tensor in (*self.inputs, *self.outputs))

    def serve(self, signature: Signature) -> None:
        """Takes and gives tensors in the shapes of a signature, where those are not the graph's own."""
        self._batched = signature.batched
        self._reshaped_inputs = {
            name: tensor.reshape for name, tensor in signature.inputs.items() if tensor.reshape is not None
        }
        self._reshaped_outputs = {
            name: tuple(tensor.wire_shape[signature.batched :])
            for name, tensor in signature.outputs.items()
            if tensor.reshape is not None
        }

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None) -> list[Array]:
        options = stop.options if isinstance(stop, OnnxStop) else self._options
        if self._needs_elements and (empty := [name for name, array in inputs.items() if not array.size]):
            raise InvalidFieldError.of(
                f"input {empty[0]!r}",
                "expected at least one element, because of the model's recurrent or attention layers; got none",
            )
        if self._reshaped_inputs:
            reshaped = {name: self._reshaped(inputs[name], axes) for name, axes in self._reshaped_inputs.items()}
            inputs = {**inputs, **reshaped}
        try:
            if self._by_value:
                answers = self._run_by_value(inputs, outputs, options)
            else:
                answers = self._session.run(outputs, inputs, options)
        except Exception as error:
            raise PenstockError(f"The model could not compute these inputs: {_brief(error)}") from error
        if self._reshaped_outputs:
            return [
                self._reshaped(array, self._reshaped_outputs[name]) if name in self._reshaped_outputs else array
                for name, array in zip(outputs, answers, strict=True)
            ]
        return answers

    def stopper(self) -> Stop:
        return OnnxStop()

    def close(self) -> None:
        self._session = None

    def _run_by_value(self, inputs: Mapping[str, Array], outputs: Sequence[str], options: Any) -> list[Array]:  # noqa: ANN401
        values = {name: _value(array) for name, array in inputs.items()}
        return [_array(value) for value in self._session.run_with_ort_values(list(outputs), values, options)]

    def _reshaped(self, array: Array, axes: tuple[int, ...]) -> Array:
        return array.reshape((len(array), *axes) if self._batched else axes)


def available_providers(preferred: Sequence[str]) -> tuple[str, ...]:
    """ONNX Runtime's names of the preferred execution providers (`cuda`, `cpu` …) that this installation has.

    The CPU is always the last resort.
    """
    known = {provider.removesuffix("ExecutionProvider").lower(): provider for provider in _installed_providers()}
    chosen = [known[name] for name in preferred if name in known]
    return (*[name for name in chosen if name != _CPU], _CPU)


_CPU = "CPUExecutionProvider"


def _installed_providers() -> list[str]:
    providers: list[str] = onnxruntime.get_available_providers()
    return providers


def _run_options() -> Any:  # noqa: ANN401  # onnxruntime publishes no types
    options = onnxruntime.RunOptions()
    options.log_severity_level = _FATAL
    return options


def _graph_tensor(node: Any) -> GraphTensor:  # noqa: ANN401  # onnxruntime.NodeArg publishes no type
    axes = tuple(axis if isinstance(axis, int) else axis or None for axis in node.shape)
    return GraphTensor(node.name, DATATYPES.get(node.type, node.type), axes)


def _value(array: Array) -> Any:  # noqa: ANN401  # onnxruntime.OrtValue publishes no type
    if array.dtype == BF16.dtype:
        # Not ascontiguousarray, which makes a scalar a vector.
        bits = np.asarray(array, order="C").view(np.uint16)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(bits, _ONNX_BF16)
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def _array(value: Any) -> Array:  # noqa: ANN401  # onnxruntime.OrtValue publishes no type
    if value.data_type() != "tensor(bfloat16)":
        array: Array = value.numpy()
        return array
    shape = value.shape()
    copied = ctypes.string_at(value.data_ptr(), int(np.prod(shape, dtype=np.int64)) * BF16.dtype.itemsize)
    return np.frombuffer(copied, BF16.dtype).reshape(shape)


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
