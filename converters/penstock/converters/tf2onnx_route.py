"""Keras to ONNX by way of a traced TensorFlow function and tf2onnx."""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import keras
import onnx
import tensorflow as tf
from numpy.typing import NDArray
from onnx import numpy_helper
from tf2onnx import optimizer, tf_loader, tfonnx

import penstock.converters.tf_images
import penstock.converters.tf_integers
import penstock.converters.tf_numerics
import penstock.converters.tf_spectra  # noqa: F401 all add their operators to tf2onnx
from penstock.converters import keras_recurrent, tf_strings
from penstock.converters.errors import UnsupportedModelError, said_by
from penstock.converters.gate import nodes_of, unknown_operators
from penstock.converters.keras_images import sized_by_tensors
from penstock.converters.keras_source import KerasSource
from penstock.converters.keras_state import check_stateless
from penstock.converters.keras_text import dense_text
from penstock.converters.tf2onnx_refusals import failed, lacking

OPSET = 18
"""tf2onnx 1.17 raises above."""

_DOMAINS = {"ai.onnx.ml": 3}

_LARGE_BYTES = 2**20
"""Weights from this size on are kept out of TensorFlow's graphs, which are copied twenty times on the way."""


_READS_UNSEEN = {"BatchMatMulV2", "Conv2D", "Conv3D", "Einsum", "GatherV2", "MatMul", "Reshape"}
"""Operators that tf2onnx translates without a look at a weight."""


@dataclass(frozen=True)
class TracedGraph:
    """A TensorFlow graph with its weights as constants, and the names of its tensors in the order of the source's.

    An output name comes twice if the model gives one tensor under two names. Large weights are inputs of the graph
    besides: `weights` has them, by the names of the tensors.
    """

    graph: Any
    weights: Mapping[str, keras.Variable]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    tables: Mapping[str, tf_strings.Table]


def trace(source: KerasSource) -> TracedGraph:
    """Records what the model does at inference, on the CPU: cuDNN's kernels do not convert.

    Raises `UnsupportedModelError` where a layer asks for the value of a tensor, for texts as ONNX has them not, and
    for answers that change.
    """
    distinct: dict[int, int] = {}
    positions: list[int] = []

    large = source.weights(_LARGE_BYTES)
    count = len(source.inputs)

    def inference(*tensors: Any) -> list[Any]:  # noqa: ANN401 symbolic TensorFlow tensors
        with _standing_for(zip(large, tensors[count:], strict=True)):
            outputs = source.call(*tensors[:count])
        positions[:] = [distinct.setdefault(id(output), len(distinct)) for output in outputs]
        # An identity makes an output of what is an input, too.
        return [tf.identity(next(output for output in outputs if id(output) == key)) for key in distinct]

    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in source.inputs]
    specs += [tf.TensorSpec(weight.shape, weight.dtype, name=weight.path) for weight in large]
    layers = source.layers
    with (
        tf.device("/CPU:0"),
        keras_recurrent.marked(),
        _inlined_functions(),
        dense_text(layers),
        sized_by_tensors(layers),
    ):
        try:
            function = tf.function(inference, autograph=False).get_concrete_function(*specs)
        except Exception as error:  # a layer raises what it likes
            raise UnsupportedModelError(
                f"The model cannot be traced: {said_by(error)} Use keras.ops in its layers, and no Python values of "
                "tensors."
            ) from error
    check_stateless(function, source.weights(0))
    # Constants that the model captured stand behind the inputs; they are frozen like weights.
    inputs = [tensor.name for tensor in function.inputs[: len(specs)]]
    outputs = [tensor.name for tensor in function.outputs]
    with _silent("tensorflow", "tf2onnx"):  # they warn of tables, which are kept apart here
        graph = tf_loader.from_function(function, inputs, outputs)
    tables = tf_strings.captured_tables(function, layers)
    weights = {
        tensor.op.name: weight for tensor, weight in zip(function.inputs[count : len(specs)], large, strict=True)
    }
    return TracedGraph(
        graph,
        _set_aside(graph, weights),
        tuple(inputs[:count]),
        tuple(outputs[position] for position in positions),
        tables,
    )


@contextmanager
def _standing_for(pairs: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Tensors in place of weights."""
    mapping = list(pairs)
    if not mapping:
        yield
        return
    with keras.StatelessScope(state_mapping=mapping):
        yield


def _set_aside(graph: Any, weights: Mapping[str, keras.Variable]) -> dict[str, keras.Variable]:  # noqa: ANN401 a GraphDef
    """The weights, by the names of their tensors, that only such operators read as need not know their values.

    The others become constants of the graph.
    """
    readers: dict[str, set[str]] = defaultdict(set)
    for node in graph.node:
        for tensor in node.input:
            readers[tensor.partition(":")[0]].add(node.op)
    aside = {}
    for node in graph.node:
        weight = weights.get(node.name)
        if weight is None:
            continue
        if readers[node.name] <= _READS_UNSEEN:
            aside[f"{node.name}:0"] = weight
        else:
            node.CopyFrom(tf.compat.v1.NodeDef(name=node.name, op="Const"))
            node.attr["value"].tensor.CopyFrom(tf.make_tensor_proto(_value(weight)))
            node.attr["dtype"].type = node.attr["value"].tensor.dtype
    return aside


def _value(weight: keras.Variable) -> NDArray[Any]:
    """Not for keeping: it may be a copy."""
    value: NDArray[Any] = keras.ops.convert_to_tensor(weight).numpy()
    return value


def _take_in(model: onnx.ModelProto, weights: Mapping[str, keras.Variable]) -> None:
    """Makes the inputs that stand for weights weights."""
    inputs = [value for value in model.graph.input if value.name not in weights]
    model.graph.initializer.extend(
        numpy_helper.from_array(_value(weights[value.name]), value.name)
        for value in model.graph.input
        if value.name in weights
    )
    del model.graph.input[:]
    model.graph.input.extend(inputs)


@contextmanager
def _inlined_functions() -> Iterator[None]:
    """What Keras compiles with XLA, grouped convolutions say, becomes a part of the graph instead of a call."""
    before = tf.config.functions_run_eagerly()
    tf.config.run_functions_eagerly(True)
    try:
        yield
    finally:
        tf.config.run_functions_eagerly(before)


@contextmanager
def _silent(*loggers: str) -> Iterator[None]:
    levels = {name: logging.getLogger(name).level for name in loggers}
    for name in loggers:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def to_onnx(traced: TracedGraph, source: KerasSource) -> onnx.ModelProto:
    """Translates the graph, keeping TensorFlow's names. Raises `UnsupportedModelError`, naming operators and layers."""
    inputs, outputs = [*traced.inputs, *traced.weights], list(dict.fromkeys(traced.outputs))
    layers, operators = source.layer_names, {node.name: node.op for node in traced.graph.node}
    with _collected_errors() as errors:
        try:
            with tf.device("/CPU:0"), tf.Graph().as_default() as graph:
                tf.import_graph_def(traced.graph, name="")
                translated = tfonnx.process_tf_graph(
                    graph,
                    opset=OPSET,
                    input_names=inputs,
                    output_names=outputs,
                    custom_rewriter=tf_strings.rewriters(traced.tables),
                    continue_on_error=True,
                )
                model = optimizer.optimize_graph(translated, optimizers=_optimizers(translated)).make_model("")
        except Exception as error:  # tf2onnx raises whatever its handler raised
            said = failed(errors, operators, layers) if errors else f"tf2onnx cannot translate the model: {error}."
            raise UnsupportedModelError(said) from error
    _declare_operators(model)
    _take_in(model, traced.weights)
    if unknown := unknown_operators(model):
        raise UnsupportedModelError(lacking(unknown, layers, OPSET))
    # tf2onnx goes on after an error and leaves a graph that may load and be wrong.
    if errors:
        raise UnsupportedModelError(failed(errors, operators, layers))
    return model


_UNWANTED = {"einsum_optimizer", "merge_duplication"}
"""The one writes ten nodes for what `fusion` makes one of. The other keeps just any of several equal nodes, which ONNX
Runtime merges itself as it loads."""

_OPTIMIZED_OPERATORS = {
    "remove_redundant_upsample": {"Upsample"},
    "const_dequantize_optimizer": {"DequantizeLinear"},
    "loop_optimizer": {"Loop"},
    "reshape_optimizer": {"Shape"},
    "global_pool_optimizer": {"ReduceMax", "ReduceMean"},
    "q_dq_optimizer": {"QuantizeLinear"},
}
"""What some of tf2onnx's optimizers are about. Where it is not there, a copy of the graph can be saved."""


def _declare_operators(model: onnx.ModelProto) -> None:
    """The versions of the operator sets that the nodes are taken from. Texts need a later one of ONNX."""
    nodes = list(nodes_of(model.graph))
    versions = {node.domain: _DOMAINS.get(node.domain, 1) for node in nodes}
    versions[""] = tf_strings.STRING_OPSET if versions.keys() - {""} else OPSET
    del model.opset_import[:]
    model.opset_import.extend(onnx.helper.make_opsetid(*entry) for entry in versions.items())


def _optimizers(graph: Any) -> dict[str, Any]:  # noqa: ANN401 tf2onnx publishes no types
    known = optimizer._get_optimizers()  # noqa: SLF001 the only list of them
    nodes = graph.get_nodes()
    operators = {node.type for node in nodes}
    has_bodies = any(node.get_body_graphs() for node in nodes)
    return {
        name: made
        for name, made in known.items()
        if name not in _UNWANTED and (has_bodies or operators & _OPTIMIZED_OPERATORS.get(name, operators))
    }


@contextmanager
def _collected_errors() -> Iterator[list[logging.LogRecord]]:
    """tf2onnx reports what it cannot do in its log only; here nothing of it reaches the log."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.ERROR)
    handler.emit = records.append  # type: ignore[method-assign, assignment]  # a class for one method would say no more
    logger = logging.getLogger("tf2onnx")
    propagate = logger.propagate
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield records
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagate
