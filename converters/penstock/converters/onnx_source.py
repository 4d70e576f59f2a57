"""A model that is ONNX already: it is cleaned, and the gate compares what is left with what was there."""

import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from penstock.converters.errors import UnsupportedModelError
from penstock.converters.fusion.graph import Graph
from penstock.converters.gate import tensors_read
from penstock.converters.onnx_functions import check_functions, inlined
from penstock.converters.parity import Tensors
from penstock.converters.runtime import Runtime, RuntimeDeathError, RuntimeRefusalError
from penstock.converters.signature import Signature, TensorSpec, read_signature
from penstock.converters.source import DATATYPES, TEXT, SourceTensor
from penstock.converters.writing import write

_DTYPES = {datatype: dtype for dtype, datatype in DATATYPES.items()}
_WORDS = np.asarray(["a", "the", "penstock", "water", "Turbine", "7"], object)


class OnnxSource:
    """An ONNX model, run as it is, without ONNX Runtime's optimizations. Raises `UnsupportedModelError`."""

    def __init__(self, model: onnx.ModelProto) -> None:
        check_functions(model, "The model")
        model = _with_shapes(inlined(model))
        self._model = model
        signature = read_signature(model)
        self.inputs = tuple(source_tensor(spec) for spec in signature.inputs)
        self.outputs = tuple(source_tensor(spec) for spec in signature.outputs)
        with ExitStack() as opening:
            folder = opening.enter_context(tempfile.TemporaryDirectory(prefix="penstock-source-"))
            path = Path(folder) / "model.onnx"
            write(path, model)
            self._runtime = opening.enter_context(Runtime(path, is_optimized=False))
            try:
                self._runtime.load()
            except (RuntimeRefusalError, RuntimeDeathError) as error:
                raise UnsupportedModelError(
                    f"ONNX Runtime {onnxruntime.__version__} cannot load it: "
                    f"{str(error).replace(str(path), 'the model')}."
                ) from error
            self._open = opening.pop_all()

    def close(self) -> None:
        self._open.close()

    @property
    def name(self) -> str:
        return str(self._model.graph.name)

    @property
    def description(self) -> str:
        return f"onnxruntime {onnxruntime.__version__}, unoptimized"

    def answer(self, rows: Tensors) -> dict[str, NDArray[Any]]:
        return self._runtime.answer(rows)

    def random_rows(self, shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, NDArray[Any]]:
        """Standard normal numbers, words, and integers 0 and 1: what an index may be is not in the graph."""
        random = np.random.default_rng(seed)
        return {tensor.name: _random(random, tensor.dtype, tuple(shapes[tensor.name])) for tensor in self.inputs}

    def own_rows(self) -> Mapping[str, Tensors]:
        return {}

    def to_onnx(self, _: Signature) -> onnx.ModelProto:
        """The model without what no output needs. Names stay as they are."""
        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        graph = model.graph
        needed = {value.name for value in graph.output}
        nodes: list[onnx.NodeProto] = []
        for node in reversed(list(graph.node)):
            if needed.intersection(node.output):
                nodes.append(node)
                needed.update(tensors_read(node))
        defaults = {constant.name for constant in graph.initializer}
        kept = onnx.GraphProto(
            node=reversed(nodes),
            initializer=[constant for constant in graph.initializer if constant.name in needed],
            sparse_initializer=[constant for constant in graph.sparse_initializer if constant.values.name in needed],
            input=[value for value in graph.input if value.name not in defaults or value.name in needed],
            value_info=[value for value in graph.value_info if value.name in needed],
        )
        for part in ("node", "initializer", "sparse_initializer", "input", "value_info"):
            graph.ClearField(part)
        graph.MergeFrom(kept)
        return model


def _with_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model with those shapes of outputs that it leaves to inference."""
    if all(value.type.tensor_type.HasField("shape") for value in model.graph.output):
        return model
    graph, copy = Graph(model), onnx.ModelProto()
    copy.CopyFrom(model)
    for value in copy.graph.output:
        shape, datatype = graph.shape(value.name), graph.datatype(value.name)
        if shape is not None and datatype is not None:
            value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, datatype, shape))
    return copy


def source_tensor(spec: TensorSpec) -> SourceTensor:
    if spec.datatype not in _DTYPES:
        raise UnsupportedModelError(
            f"{spec.name!r} is of type {spec.datatype}, which numpy has not; known are {', '.join(sorted(_DTYPES))}."
        )
    return SourceTensor(spec.name, _DTYPES[spec.datatype], spec.shape)


def _random(random: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> NDArray[Any]:
    if dtype == TEXT:
        return random.choice(_WORDS, shape)
    if dtype.startswith("float"):
        return random.standard_normal(shape).astype(dtype)
    return random.integers(0, 2, shape).astype(dtype)
