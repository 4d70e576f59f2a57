"""What torch.export finds in a module, and ONNX by torch's own exporter."""

import io
import linecache
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import Any

import onnx
import torch
from torch.export import Dim, ExportedProgram

from penstock.converters.errors import UnsupportedModelError
from penstock.converters.signature import BATCH
from penstock.converters.source import DATATYPES, NamedShape, Shape

Rows = Mapping[str, torch.Tensor]
Run = Callable[[Rows], Any]
"""Runs a module on rows by the names of its inputs, and gives whatever the module gives."""

OPSET = 18
"""The one that the exporter writes itself; newer ones it converts from it."""

_ROWS_TRACED = 5
"""torch.export takes a size of one for a fixed one."""

_ATTENTION = torch.ops.aten.scaled_dot_product_attention.default

# What the dynamic axes of a tensor are called, by its rank. Channels are first, as torch has them.
_AXES = {
    2: {1: "sequence"},
    3: {1: "sequence", 2: "length"},
    4: {2: "height", 3: "width"},
    5: {2: "depth", 3: "height", 4: "width"},
}
# Sizes at which dynamic axes are tried; the gate asks about some between them.
_STEPS_TRIED = (16, 41)
_PIXELS_TRIED = (64, 97)


def export(module: torch.nn.Module, samples: Rows, run: Run) -> ExportedProgram:
    """The module's program, whose first axes are of any size, and other axes too where the module works with any.

    `samples` are the parameters of forward, in its order. Raises `UnsupportedModelError`.
    """
    rows = {name: _resized(tensor, [_ROWS_TRACED, *tensor.shape[1:]]) for name, tensor in samples.items()}
    try:
        run(rows)
    except Exception as error:  # a module raises what it likes
        raise UnsupportedModelError(
            f"forward fails on {_ROWS_TRACED} rows, which are the samples repeated: {cause(error)} The first axis of "
            "every input must be the batch, of any size."
        ) from error
    program = _with_free_axes(module, rows, run) or _with_free_batch(module, rows)
    for name, shape in zip(samples, input_shapes(program), strict=True):
        if isinstance(shape[0], int):
            raise UnsupportedModelError(
                f"forward fixes the first axis of {name!r}, the batch, at {shape[0]}. Take the size from the tensor "
                "(`x.shape[0]`, or -1 in a reshape) where a number is written."
            )
    return program


def placeholders(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """The inputs by name, as tensors without numbers. Raises `UnsupportedModelError` if one is no tensor."""
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found = {}
    for name in program.graph_signature.user_inputs:
        value = nodes[name].meta.get("val") if name in nodes else None
        if not isinstance(value, torch.Tensor):
            raise UnsupportedModelError(
                f"The program's input {name!r} is no tensor. Export a module whose forward takes tensors alone."
            )
        found[name] = value
    return found


def input_shapes(program: ExportedProgram) -> list[NamedShape]:
    """The shapes of the inputs. Axes that must agree in size have one name."""
    values = placeholders(program)
    shapes = {name: _sizes(value) for name, value in values.items()}
    called = {shape[0]: BATCH for shape in shapes.values() if shape and isinstance(shape[0], str)}
    for name, shape in shapes.items():
        for axis, size in enumerate(shape):
            if isinstance(size, str) and size not in called:
                meaning = _AXES.get(len(shape), {}).get(axis, f"{name}_axis_{axis}")
                called[size] = f"{name}_{meaning}" if meaning in called.values() else meaning
    return [tuple(called[size] if isinstance(size, str) else size for size in shape) for shape in shapes.values()]


def output_shapes(program: ExportedProgram) -> list[Shape]:
    """The shapes of the outputs that are tensors, None for a dynamic size."""
    (outputs,) = program.graph.output_node().args
    values = [output.meta["val"] for output in outputs if isinstance(output, torch.fx.Node)]
    return [tuple(size if isinstance(size, int) else None for size in _sizes(value)) for value in values]


def dtype_of(tensor: torch.Tensor, what: str) -> str:
    """The datatype's name in numpy. Raises `UnsupportedModelError` if it has none."""
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in DATATYPES:
        raise UnsupportedModelError(
            f"{what} is of type {dtype}, which numpy has not; known are {', '.join(DATATYPES)}. Convert a copy in "
            "float32: copy.deepcopy(module).float()."
        )
    return dtype


def to_onnx(program: ExportedProgram) -> onnx.ModelProto:
    """The program with torch's names. Raises `UnsupportedModelError`, naming the operator."""
    try:
        with torch.no_grad(), quiet():
            spelled_out = program.run_decompositions({_ATTENTION: _attention})
            exported = torch.onnx.export(spelled_out, dynamo=True, verbose=False, opset_version=OPSET)
        model: onnx.ModelProto = exported.model_proto
    except Exception as error:  # the exporter raises whatever a translation raised
        first: BaseException = error
        while first.__cause__ is not None:
            first = first.__cause__
        raise UnsupportedModelError(
            f"torch.onnx cannot say the module in ONNX: {cause(first)} Replace the operation, or serve the module as a "
            "Python model."
        ) from error
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """Silences what torch warns of: what it does itself, packages that are not there. Users can change nothing."""
    disabled = logging.root.manager.disable
    logging.disable(max(disabled, logging.WARNING))
    try:
        with warnings.catch_warnings(action="ignore"):
            yield
    finally:
        logging.disable(disabled)


def cause(error: BaseException) -> str:
    """The first line of what an error says, and the line of the user's code that it arose in, if there is one."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)[:300]
    text = f"{text.rstrip('.')}."
    foreign = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(foreign)]
    if not frames:
        return text
    file, line = frames[-1].filename, frames[-1].lineno or 0
    return f"{text} It arises in {Path(file).name}, line {line}: `{linecache.getline(file, line).strip()}`."


def _attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,  # zero in evaluation, but torch gives it
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """Attention as torch computes it: a query that may look at nothing is answered with zeros, not NaN.

    The exporter forgets that. That nothing may be looked at is read off the mask, which is smaller than the scores.
    """
    if enable_gqa:
        key, value = (_repeated(one, query.shape[-3]) for one in (key, value))
    scores = query * (query.shape[-1] ** -0.5 if scale is None else scale) @ key.transpose(-2, -1)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is None:
        return scores.softmax(-1) @ value
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.where(attn_mask, 0.0, -torch.inf).to(scores.dtype)
    answer = (scores + attn_mask).softmax(-1) @ value
    if is_causal:
        return answer
    return torch.where((attn_mask > -torch.inf).any(-1, keepdim=True), answer, 0.0)


def _repeated(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Each head as often as there are queries for it. `repeat_interleave` becomes a Reshape that fails on no rows."""
    *batch, groups, steps, size = tensor.shape
    wide = tensor.unsqueeze(-3).expand(*batch, groups, heads // groups, steps, size)
    return wide.reshape(*batch, heads, steps, size)


def _sizes(value: torch.Tensor) -> NamedShape:
    """A shape with torch's symbols as texts. A symbol that was found to have one value only says that value."""
    return tuple(int(text) if text.isdecimal() else text for text in map(str, value.shape))


def _with_free_axes(module: torch.nn.Module, rows: Rows, run: Run) -> ExportedProgram | None:
    """A program whose axes are as free as torch.export finds them; None if that is not so when they are tried.

    A U-Net, say, wants multiples of eight, and only fails where it puts two images together.
    """
    try:
        program = _exported(module, rows, {name: dict.fromkeys(range(rows[name].ndim), Dim.AUTO) for name in rows})
        for sizes in zip(_STEPS_TRIED, _PIXELS_TRIED, strict=True):
            run(_with_sizes(rows, input_shapes(program), *sizes))
    except Exception:  # a module raises what it likes; with a free batch alone it may work
        return None
    return program


def _with_free_batch(module: torch.nn.Module, rows: Rows) -> ExportedProgram:
    try:
        return _exported(module, rows, {name: {0: Dim.AUTO} for name in rows})
    except Exception as error:  # so does torch.export
        raise UnsupportedModelError(
            f"torch.export cannot follow forward: {cause(error)} What depends on the numbers in a tensor must be said "
            "by operators (torch.where, torch.cond); or serve the module as a Python model."
        ) from error


def _exported(module: torch.nn.Module, rows: Rows, dynamic: Mapping[str, Mapping[int, Any]]) -> ExportedProgram:
    # It prints the graph as far as it came before it raises.
    with torch.no_grad(), quiet(), redirect_stderr(io.StringIO()):
        return torch.export.export(module, (), dict(rows), dynamic_shapes=dict(dynamic))


def _with_sizes(rows: Rows, shapes: Sequence[NamedShape], steps: int, pixels: int) -> dict[str, torch.Tensor]:
    """The rows with their dynamic axes, but for the batch, at these sizes."""
    ranks = {axis: len(shape) for shape in shapes for axis in shape if axis != BATCH}
    chosen = {axis: steps if rank < 4 else pixels for axis, rank in ranks.items()}
    return {
        name: _resized(
            tensor,
            [
                chosen[axis] if isinstance(axis, str) and axis in chosen else size
                for axis, size in zip(shape, tensor.shape, strict=True)
            ],
        )
        for (name, tensor), shape in zip(rows.items(), shapes, strict=True)
    }


def _resized(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """The same numbers, cut off or over again along each axis."""
    for axis, size in enumerate(shape):
        tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor
