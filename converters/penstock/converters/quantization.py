"""Other forms of a graph, with fewer bits in its weights or more zeros: smaller or faster, and not quite the same.

What they cost and gain is measured elsewhere (`penstock.converters.variant_trial`): here they are only made.
"""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    CalibrationMethod,
    QuantFormat,
    QuantType,
    quantize_dynamic,
    quantize_static,
)
from onnxruntime.transformers import float16

from penstock.converters.errors import ConversionError, InvalidSamplesError
from penstock.converters.fusion.graph import Graph, attribute
from penstock.converters.gate import RUNTIME_DOMAIN, nodes_of
from penstock.converters.onnx_source import source_tensor
from penstock.converters.parity import Tensors
from penstock.converters.signature import read_signature
from penstock.converters.source import fitted_samples
from penstock.converters.variants import Form

CALIBRATION_ROWS = 256
"""Ranges of activations settle long before; more rows only take time."""
_CALIBRATION_BATCH_SIZE = 32
_INT4_BLOCK = 32
"""Weights that share one scale. The smallest block that ONNX Runtime's fast kernels take is the most accurate one."""
_INT8_PRODUCTS = 4
"""MatMulNBits's `accuracy_level`: rows are rounded to int8 for the product, twice as fast on a single row."""
_FLOAT16_MAX = float(np.finfo(np.float16).max)


def quantize(
    model: onnx.ModelProto, form: Form, *, rows: Tensors | None = None, sparsity: float = 0.5
) -> onnx.ModelProto:
    """Another form of a graph that `optimize` made; the given one stays as it is.

    * `fp16`: weights and activations in half precision, but for nodes whose weights are beyond its range.
    * `int8`: products with weights and LSTMs in 8 bits, activations rounded to the range of each batch as it comes.
    * `int8-static`: products with weights and convolutions in 8 bits, activations rounded to the ranges that they have
      on `rows`, an array for each input by name, of which the first 256 count.
    * `int4`: weights of products in 4 bits, each 32 of a column with a scale; activations as for `int8`.
    * `pruned`: of every weight of a product, convolution or recurrent layer, the share `sparsity` that is smallest in
      magnitude is zero.

    Inputs and outputs keep names, order, datatypes and shapes. The same graph and rows give the same bytes. Raises
    `InvalidSamplesError` if `int8-static` has no rows or they do not fit the inputs, and `ConversionError` if the graph
    cannot be had in this form or nothing in it changes.
    """
    if not 0 < sparsity < 1:
        raise ValueError(f"The sparsity is a share between 0 and 1, both left out; it is {sparsity}.")
    makers: dict[Form, Callable[[onnx.ModelProto], onnx.ModelProto]] = {
        "fp16": _half_precision,
        "int8": _dynamic_int8,
        "int8-static": lambda graph: _static_int8(graph, rows),
        "int4": _weight_int4,
        "pruned": lambda graph: _pruned(graph, sparsity),
    }
    if form not in makers:
        raise ConversionError(f"There is no variant {form!r}. Variants are {', '.join(makers)}.")
    if rows is not None:
        _, rows = fitted_samples([source_tensor(spec) for spec in read_signature(model).inputs], rows)
    try:
        made = makers[form](model)
    except ConversionError:
        raise
    except Exception as error:  # the quantizers of ONNX Runtime raise what they like
        raise ConversionError(f"The graph cannot be had as {form}: {type(error).__name__}: {error}") from error
    made = _like(model, made)
    if _digests(made) == _digests(model):
        raise ConversionError(f"The graph has nothing that would be another as {form}. Serve it as it is.")
    return made


def _half_precision(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    wide = {constant.name for constant in model.graph.initializer if _is_beyond_float16(constant)}
    kept = [node.name for node in model.graph.node if wide & set(node.input)]
    made = float16.convert_float_to_float16(copy, keep_io_types=True, node_block_list=kept)
    return Graph(made).finish()  # its casts stand behind those who read them


def _is_beyond_float16(constant: TensorProto) -> bool:
    if constant.data_type != TensorProto.FLOAT:
        return False
    magnitudes = np.abs(numpy_helper.to_array(constant))
    return bool(np.any(np.isfinite(magnitudes) & (magnitudes > _FLOAT16_MAX)))


def _dynamic_int8(model: onnx.ModelProto) -> onnx.ModelProto:
    def run(source: onnx.ModelProto, target: Path) -> None:
        quantize_dynamic(source, target, op_types_to_quantize=["MatMul", "LSTM"], per_channel=True)

    return _by_runtime(model, frozenset({"Gemm", "MatMul", "LSTM"}), run)


def _static_int8(model: onnx.ModelProto, rows: Tensors | None) -> onnx.ModelProto:
    if rows is None:
        raise InvalidSamplesError(
            "int8-static needs rows to see the ranges of activations on: none were given. Give some hundred typical "
            "rows (`rows`, `samples`, or --samples), or take int8, which needs none."
        )

    operators = frozenset({"Conv", "Gemm", "MatMul"})

    def run(source: onnx.ModelProto, target: Path) -> None:
        quantize_static(
            source,
            target,
            _Calibration(model, rows),
            quant_format=QuantFormat.QDQ,
            op_types_to_quantize=sorted(operators),
            per_channel=True,
            activation_type=QuantType.QUInt8,
            weight_type=QuantType.QInt8,
            calibrate_method=CalibrationMethod.MinMax,
            extra_options={"MatMulConstBOnly": True},
        )

    return _by_runtime(model, operators, run)


class _Calibration(CalibrationDataReader):  # type: ignore[misc] # ONNX Runtime publishes no types
    def __init__(self, model: onnx.ModelProto, rows: Tensors) -> None:
        self._batches = _batches(model, rows)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        return next(self._batches, None)


def _batches(model: onnx.ModelProto, rows: Tensors) -> Iterator[dict[str, NDArray[Any]]]:
    """A graph with a fixed number of rows gets them as they are."""
    first = model.graph.input[0].type.tensor_type.shape.dim
    if not first or first[0].HasField("dim_value"):
        yield dict(rows)
        return
    count = min(CALIBRATION_ROWS, *(len(array) for array in rows.values()))
    for start in range(0, count, _CALIBRATION_BATCH_SIZE):
        stop = min(start + _CALIBRATION_BATCH_SIZE, count)
        yield {name: array[start:stop] for name, array in rows.items()}


def _by_runtime(
    model: onnx.ModelProto, operators: frozenset[str], run: Callable[[onnx.ModelProto, Path], None]
) -> onnx.ModelProto:
    """ONNX Runtime's quantizers write files, and advise against a graph that has not been through their own tools."""
    source = onnx.ModelProto()
    source.CopyFrom(model)
    if not any(node.op_type in operators for node in nodes_of(model.graph)):
        return source
    source.metadata_props.add(key="onnx.quant.pre_process", value="onnxruntime.quant")
    with tempfile.TemporaryDirectory(prefix="penstock-quantize-") as folder:
        target = Path(folder) / "model.onnx"
        run(source, target)
        return onnx.load(target)


def _weight_int4(model: onnx.ModelProto) -> onnx.ModelProto:
    graph = Graph(model)
    for node in list(graph.nodes("MatMul", "Gemm")):
        weight = graph.constant(node.input[1])
        if weight is None or weight.dtype != np.float32 or weight.ndim != 2:
            continue
        if node.op_type == "Gemm":
            if (
                attribute(node, "transA", 0)
                or attribute(node, "alpha", 1.0) != 1.0
                or attribute(node, "beta", 1.0) != 1.0
            ):
                continue
            weight = weight.T if attribute(node, "transB", 0) else weight
        depth, columns = weight.shape
        packed, scales = _packed_int4(weight)
        inputs = [
            node.input[0],
            graph.add_constant(packed, f"{node.input[1]}_int4"),
            graph.add_constant(scales, f"{node.input[1]}_scales"),
        ]
        product = graph.add(
            "MatMulNBits",
            inputs,
            f"{node.name}_int4",
            None if len(node.input) > 2 else node.output[0],
            RUNTIME_DOMAIN,
            K=depth,
            N=columns,
            bits=4,
            block_size=_INT4_BLOCK,
            accuracy_level=_INT8_PRODUCTS,
        )
        if len(node.input) > 2:
            graph.add("Add", [product, node.input[2]], f"{node.name}_bias", node.output[0])
    return graph.finish()


def _packed_int4(weight: NDArray[np.float32]) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """A weight [K, N] as MatMulNBits has it: [N, K / 32, 16] bytes, the lower half first, and scales [N, K / 32].

    A number is (its half byte − 8) × scale; the largest in magnitude of each block is −8 of them, exact.
    """
    depth, columns = weight.shape
    blocks = -(-depth // _INT4_BLOCK)
    padded = np.zeros((columns, blocks * _INT4_BLOCK), np.float32)
    padded[:, :depth] = weight.T
    padded = padded.reshape(columns, blocks, _INT4_BLOCK)
    extreme = np.take_along_axis(padded, np.abs(padded).argmax(axis=2, keepdims=True), axis=2)
    scales = (extreme / -8).astype(np.float32)
    steps = np.divide(padded, scales, out=np.zeros_like(padded), where=scales != 0)
    halves = (np.clip(np.rint(steps), -8, 7) + 8).astype(np.uint8)
    return (halves[..., ::2] + 16 * halves[..., 1::2]).astype(np.uint8), scales[..., 0]


def _pruned(model: onnx.ModelProto, sparsity: float) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    weights = set()
    for node in copy.graph.node:
        if node.op_type in {"MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN"} and not node.domain:
            weights |= {node.input[1], *(node.input[2:3] if node.op_type in {"LSTM", "GRU", "RNN"} else ())}
    for constant in copy.graph.initializer:
        if constant.name in weights and constant.data_type == TensorProto.FLOAT and len(constant.dims) > 1:
            values = numpy_helper.to_array(constant).copy()
            smallest = np.argsort(np.abs(values), axis=None, kind="stable")[: int(sparsity * values.size)]
            values.flat[smallest] = 0
            constant.CopyFrom(numpy_helper.from_array(values, constant.name))
    return copy


def _like(model: onnx.ModelProto, made: onnx.ModelProto) -> onnx.ModelProto:
    """What the quantizers wrote about themselves and about the caller's tensors is as it was."""
    for field in ("producer_name", "producer_version", "domain", "doc_string"):
        setattr(made, field, getattr(model, field))
    made.model_version = model.model_version
    del made.metadata_props[:], made.graph.input[:], made.graph.output[:]
    made.metadata_props.extend(model.metadata_props)
    made.graph.name = model.graph.name
    made.graph.input.extend(model.graph.input)
    made.graph.output.extend(model.graph.output)
    return made


def _digests(model: onnx.ModelProto) -> Mapping[str, str]:
    """Of every weight; the weights themselves twice over might not fit the memory."""
    return {
        constant.name: sha256(constant.SerializeToString(deterministic=True)).hexdigest()
        for constant in model.graph.initializer
    }
