"""The one gate every converted graph passes before it becomes a file."""

import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state

from penstock.converters.errors import GateError
from penstock.converters.parity import (
    Batch,
    ParityCase,
    ParityReport,
    SkippedRows,
    Tensors,
    Tolerance,
    compare,
    tolerance_of,
)
from penstock.converters.probe import Examination
from penstock.converters.runtime import Runtime, RuntimeDeathError, RuntimeRefusalError
from penstock.converters.signature import Signature, TensorSpec, read_signature
from penstock.converters.writing import write

RUNTIME_DOMAIN = "com.microsoft"
"""Of the operators that ONNX Runtime has beyond the standard."""

_REPORT_AS_BUG = (
    "This is a fault of the conversion, not of the model: nothing was written. Please report it with the model."
)


# Warnings of ONNX Runtime that mean a graph is wrong though it may run. The others are in the report.
_FAULTS = (
    "Falling back to lenient merge",  # a tensor has two shapes
    "does not match actual shape",
    "It is not used by any node",
    "Duplicate initializer",
)


# ONNX does not say what these make of NaN, and ONNX Runtime makes another thing of it than most others.
_NAN_IS_OPEN = frozenset(
    {
        "ArgMax",
        "ArgMin",
        "Clip",
        "DFT",
        "Max",
        "MaxPool",
        "Min",
        "NonMaxSuppression",
        "ReduceMax",
        "ReduceMin",
        "Resize",
        "TopK",
    }
)


_LOST_OF_SUM = 2.0**-22


def verify(model: onnx.ModelProto, asked: Examination, tolerance: Tolerance | None, source: str) -> ParityReport:
    """Lets a graph pass that is valid, loads, has the source's signature and answers each batch as it did.

    `source` names what gave the answers (`keras 3.15.1`). Without a tolerance, the model has its own, or each datatype.
    Raises `GateError`, and `ConversionError` if there is no room for a temporary file.
    """
    tolerance = tolerance or asked.tolerance
    lost = _lost_in_trees(model)
    with tempfile.TemporaryDirectory(prefix="penstock-gate-") as folder:
        path = Path(folder) / "model.onnx"
        write(path, model)
        check_form(model, asked.signature, path)
        with Runtime(path) as runtime:
            _load(runtime)
            batches = [_loosened(batch, lost) for batch in asked.batches] if lost else asked.batches
            ask = partial(_outcome, runtime, asked.signature, tolerance, _open_to_nan(model))
            outcomes = {index: ask(batch) for index, batch in enumerate(batches) if batch.size}
            warnings = runtime.warnings()
            # What is said of no rows says nothing of the graph.
            outcomes |= {index: ask(batch) for index, batch in enumerate(batches) if not batch.size}
            found = [outcomes[index] for index in sorted(outcomes)]
    if faults := [text for text in warnings if any(fault in text for fault in _FAULTS)]:
        raise GateError(f"ONNX Runtime warns of the graph: {faults[0]} {_REPORT_AS_BUG}")
    return ParityReport.of(
        [case for outcome in found if not isinstance(outcome, SkippedRows) for case in outcome],
        _tolerances(asked, tolerance),
        source=source,
        runtime=f"onnxruntime {onnxruntime.__version__}",
        skipped=[*asked.skipped, *(outcome for outcome in found if isinstance(outcome, SkippedRows))],
        warnings=warnings,
    )


def check_form(model: onnx.ModelProto, signature: Signature, path: Path) -> None:
    """Raises `GateError` unless the graph, which lies in the file, is valid and has the signature."""
    _check_graph(model, path)
    _check_inputs(model, signature)
    _check_signature(read_signature(model), signature)


def _load(runtime: Runtime) -> None:
    try:
        runtime.load()
    except (RuntimeRefusalError, RuntimeDeathError) as error:
        raise GateError(f"ONNX Runtime cannot load the graph: {error}. {_REPORT_AS_BUG}") from error


def _outcome(
    runtime: Runtime, signature: Signature, tolerance: Tolerance | None, open_to_nan: Mapping[str, str], batch: Batch
) -> list[ParityCase] | SkippedRows:
    """What a batch shows of each output, or why it was left out."""
    try:
        answers = runtime.answer(batch.inputs)
    except (RuntimeRefusalError, RuntimeDeathError) as error:
        if not batch.size:
            # Kernels of texts refuse no rows; recurrent and attention ones end the process on them.
            return SkippedRows(batch.rows, f"ONNX Runtime cannot run them: {error}")
        raise GateError(
            f"ONNX Runtime cannot run the graph on {batch.size} {batch.rows} rows: {error}. {_REPORT_AS_BUG}"
        ) from error
    if not batch.size and any(answers[name].ndim != known.ndim for name, known in batch.answers.items()):
        return SkippedRows(batch.rows, "ONNX Runtime answers in another shape than otherwise")
    _check_axes(signature, batch, answers)
    cases: list[ParityCase] = []
    left_out: list[SkippedRows] = []
    for spec in signature.outputs:
        try:
            cases.append(compare(batch, spec.name, answers[spec.name], tolerance))
        except GateError as error:
            operator = open_to_nan.get(spec.name)
            if batch.rows != "nan" or operator is None or error.row is None:
                raise
            reason = f"ONNX leaves open what {operator} makes of NaN: {spec.name!r} differs in row {error.row}"
            left_out.append(SkippedRows(batch.rows, reason))
    return left_out[0] if left_out else cases


def _lost_in_trees(model: onnx.ModelProto) -> float:
    """What ONNX Runtime's float32 may lose of a sum over trees, by the largest leaf of each: large ones may cancel."""
    largest: defaultdict[tuple[int, int], float] = defaultdict(float)
    ensembles = [node for node in nodes_of(model.graph) if node.op_type.startswith("TreeEnsemble")]
    for index, node in enumerate(ensembles):
        lists = {attribute.name: attribute for attribute in node.attribute}
        for kind in ("target", "class"):
            if f"{kind}_weights" in lists:  # as a tensor of float64 nothing is lost
                pairs = zip(lists[f"{kind}_treeids"].ints, lists[f"{kind}_weights"].floats, strict=True)
                for tree, weight in pairs:
                    largest[index, tree] = max(largest[index, tree], abs(weight))
    return _LOST_OF_SUM * sum(largest.values())


def _loosened(batch: Batch, slack: float) -> Batch:
    more = {
        name: batch.slack.get(name, 0.0) + np.full(answers.shape, slack)
        for name, answers in batch.answers.items()
        if answers.dtype.kind == "f"
    }
    return replace(batch, slack=more)


def _open_to_nan(model: onnx.ModelProto) -> dict[str, str]:
    """An operator whose NaN is open, for each output that is made with one."""
    producers = {name: node for node in model.graph.node for name in node.output}
    found = {}
    for output in model.graph.output:
        waiting, seen, operators = [output.name], set(), set()
        while waiting:
            name = waiting.pop()
            if name in seen or name not in producers:
                continue
            seen.add(name)
            node = producers[name]
            operators |= {node.op_type} | {inner.op_type for body in bodies_of(node) for inner in nodes_of(body)}
            waiting += tensors_read(node)
        if is_open := operators & _NAN_IS_OPEN:
            found[output.name] = min(is_open)
    return found


def _tolerances(asked: Examination, given: Tolerance | None) -> Mapping[str, Tolerance]:
    answers: Tensors = asked.batches[0].answers
    return {spec.datatype: tolerance_of(answers[spec.name].dtype, given) for spec in asked.signature.outputs}


def nodes_of(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """Every node of a graph and of the graphs inside it."""
    for node in graph.node:
        yield node
        for body in bodies_of(node):
            yield from nodes_of(body)


def bodies_of(node: onnx.NodeProto) -> Iterator[onnx.GraphProto]:
    """The graphs inside a node: the branches of an If, the body of a Loop."""
    for attribute in node.attribute:
        yield from (attribute.g, *attribute.graphs)


def tensors_read(node: onnx.NodeProto) -> Iterator[str]:
    """The tensors a node reads, those that the graphs inside it take from outside too."""
    yield from node.input
    for body in bodies_of(node):
        for inner in nodes_of(body):
            yield from inner.input
        yield from (value.name for value in body.output)


def unknown_operators(model: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The nodes whose operator is neither in the model's version of the ONNX standard nor ONNX Runtime's own."""
    versions = {entry.domain: entry.version for entry in model.opset_import}
    return [
        node
        for node in nodes_of(model.graph)
        if node.domain not in versions
        or not (
            onnx.defs.has(node.op_type, max_inclusive_version=versions[node.domain], domain=node.domain)
            or (node.domain == RUNTIME_DOMAIN and node.op_type in _runtime_operators())
        )
    ]


@cache
def _runtime_operators() -> frozenset[str]:
    schemas = onnxruntime_pybind11_state.get_all_operator_schema()
    return frozenset(schema.name for schema in schemas if schema.domain == RUNTIME_DOMAIN)


def _check_graph(model: onnx.ModelProto, path: Path) -> None:
    if unknown := unknown_operators(model):
        names = ", ".join(sorted({f"{node.domain or 'ai.onnx'}.{node.op_type}" for node in unknown}))
        raise GateError(f"The graph uses operators that ONNX does not have: {names}. {_REPORT_AS_BUG}")
    try:
        onnx.checker.check_model(path, full_check=True)  # by its path it may be of any size
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise GateError(f"The ONNX checker refuses the graph: {error}. {_REPORT_AS_BUG}") from error


def _check_inputs(model: onnx.ModelProto, signature: Signature) -> None:
    defaults = {initializer.name for initializer in model.graph.initializer}
    required = {value.name for value in model.graph.input} - defaults
    if leaked := sorted(required - {spec.name for spec in signature.inputs}):
        raise GateError(
            f"The graph asks its caller for {', '.join(map(repr, leaked))}, which the model holds itself: a "
            "constant or a weight was captured from outside the layers. Make it a weight of a layer, or compute it "
            "inside `call`."
        )


def _check_signature(found: Signature, expected: Signature) -> None:
    for kind, ours, theirs in (("inputs", found.inputs, expected.inputs), ("outputs", found.outputs, expected.outputs)):
        if ours != theirs:
            raise GateError(
                f"The graph's {kind} are not the model's: expected {_listed(theirs)}, got {_listed(ours)}. "
                f"{_REPORT_AS_BUG}"
            )


def _listed(specs: Sequence[TensorSpec]) -> str:
    return "; ".join(map(str, specs)) or "none"


def _check_axes(signature: Signature, batch: Batch, answers: Tensors) -> None:
    """The signature's word on sizes is tested too: an axis of one name has one size in a request."""
    sizes: dict[str, int] = {}
    tensors = {**batch.inputs, **answers}
    for spec in (*signature.inputs, *signature.outputs):
        shape = tensors[spec.name].shape
        expected = tuple(axis if isinstance(axis, int) else sizes.get(axis, -1) for axis in spec.shape)
        if len(shape) != len(expected) or any(
            size not in {-1, came} for size, came in zip(expected, shape, strict=True)
        ):
            raise GateError(f"{spec} came with the shape {list(shape)}. {_REPORT_AS_BUG}", output=spec.name)
        sizes.update((axis, size) for axis, size in zip(spec.shape, shape, strict=True) if isinstance(axis, str))
