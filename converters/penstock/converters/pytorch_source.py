"""A PyTorch module, or a program exported from one, on its way to ONNX."""

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram

from penstock.converters import naming
from penstock.converters.errors import InvalidSamplesError, UnsupportedModelError
from penstock.converters.parity import Tensors
from penstock.converters.pytorch_export import (
    Rows,
    Run,
    cause,
    dtype_of,
    export,
    input_shapes,
    output_shapes,
    placeholders,
    quiet,
    to_onnx,
)
from penstock.converters.signature import Signature
from penstock.converters.source import SourceTensor


class PytorchSource:
    """A program, and what runs the module that it was exported from. Raises `UnsupportedModelError`.

    Inputs have the names of forward's parameters. Outputs have the keys of a dict and the fields of a dataclass or
    named tuple; those of a tuple or list are `output_0`, `output_1`, a single one is `output`. None is no output.
    """

    def __init__(self, program: ExportedProgram, run: Run, examples: Rows, name: str) -> None:
        """`examples` are rows of every input, in order."""
        self._program, self._run, self._examples, self.name = program, run, examples, name
        self.inputs = tuple(
            SourceTensor(name, dtype_of(tensor, f"The input {name!r}"), shape)
            for (name, tensor), shape in zip(examples.items(), input_shapes(program), strict=True)
        )
        answers = list(_leaves(run(examples)))
        names = _distinct(("_".join(path) for path, _ in answers), taken=examples)
        self.outputs = tuple(
            SourceTensor(name, dtype_of(tensor, f"The output {name!r}"), shape)
            for name, (_, tensor), shape in zip(names, answers, output_shapes(program), strict=True)
        )

    @property
    def description(self) -> str:
        return f"torch {torch.__version__}"

    def answer(self, rows: Tensors) -> dict[str, NDArray[Any]]:
        outputs = _leaves(self._run({tensor.name: torch.tensor(rows[tensor.name]) for tensor in self.inputs}))
        return {
            tensor.name: output.numpy(force=True) for tensor, (_, output) in zip(self.outputs, outputs, strict=True)
        }

    def random_rows(self, shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, NDArray[Any]]:
        """Standard normal numbers; integers and booleans out of the samples, because an embedding has no others."""
        random = np.random.default_rng(seed)
        return {
            tensor.name: random.standard_normal(shapes[tensor.name]).astype(tensor.dtype)
            if tensor.dtype.startswith("float")
            else random.choice(self._examples[tensor.name].numpy().ravel(), tuple(shapes[tensor.name]))
            for tensor in self.inputs
        }

    def own_rows(self) -> Mapping[str, Tensors]:
        return {}

    def close(self) -> None:
        """Nothing runs."""

    def to_onnx(self, signature: Signature) -> onnx.ModelProto:
        model = to_onnx(self._program)
        inputs, outputs = ([value.name for value in values] for values in (model.graph.input, model.graph.output))
        return naming.finish(model, signature, inputs, outputs, self.name)


def open_module(module: torch.nn.Module, samples: Mapping[str, Any] | None) -> PytorchSource:
    """A module on the CPU, which is in evaluation mode only while it runs.

    The samples say what the inputs are: one array of rows for each parameter of forward. Axes are dynamic where the
    module works with any size. Raises `InvalidSamplesError` and `UnsupportedModelError`.
    """
    module = getattr(module, "_orig_mod", module)  # what torch.compile wraps
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):
        raise UnsupportedModelError(
            "torch.export does not take TorchScript. Convert the module from which the script was made."
        )
    _check_weights(name, [*module.named_parameters(), *module.named_buffers()])
    examples = _examples(module, samples)

    def run(rows: Rows) -> Any:  # noqa: ANN401 whatever the module gives
        with _evaluation(module):
            return module(**rows)

    _check_first_run(module, run, examples)
    with _evaluation(module):
        program = export(module, examples, run)
    return PytorchSource(program, run, examples, name)


def open_program(program: ExportedProgram) -> PytorchSource:
    """A program with the axes that it was exported with. Raises `UnsupportedModelError`."""
    _check_weights("The program", [*program.state_dict.items(), *program.constants.items()])
    names, module, structure = list(placeholders(program)), program.module(), program.call_spec.in_spec

    def run(rows: Rows) -> Any:  # noqa: ANN401 whatever the program gives
        arguments, keywords = structure.unflatten([rows[name] for name in names])
        with _inference():
            return module(*arguments, **keywords)

    examples = dict(zip(names, (tensor for _, tensor in _leaves(program.example_inputs)), strict=True))
    return PytorchSource(program, run, examples, "ExportedProgram")


def _check_weights(owner: str, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
    for name, weight in weights:
        if not isinstance(weight, torch.Tensor):
            raise UnsupportedModelError(f"{owner} holds {name!r}, a {type(weight).__name__}, which ONNX cannot hold.")
        if weight.device.type != "cpu":
            raise UnsupportedModelError(
                f"The weight {name!r} of {owner} is on {weight.device}; a graph is compared with the answers "
                "of the CPU. Move the module there: module.cpu()."
            )
        dtype_of(weight, f"The weight {name!r} of {owner}")


def _examples(module: torch.nn.Module, samples: Mapping[str, Any] | None) -> dict[str, torch.Tensor]:
    """The samples in the order of forward's parameters; floating numbers have the datatype of the module's weights."""
    named = [
        parameter
        for parameter in inspect.signature(module.forward).parameters.values()
        if parameter.kind in {parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY}
    ]
    names, needed = ([one.name for one in some] for some in (named, [one for one in named if one.default is one.empty]))
    if samples is None:
        raise InvalidSamplesError(
            "A PyTorch module does not say what it takes. Give convert() samples: an array of rows for each parameter "
            f"of forward, which are {names} and of which {needed} must be given."
        )
    if not samples or not set(needed) <= set(samples) <= set(names):
        raise InvalidSamplesError(
            f"Samples are needed for the parameters of forward, {names}, one array each; {needed} must be given. Got "
            f"{sorted(samples)}."
        )
    floating = next(
        (weight.dtype for weight in module.parameters() if weight.is_floating_point()), torch.get_default_dtype()
    )
    examples = {}
    for name in [name for name in names if name in samples]:
        array = np.asarray(samples[name])
        if not array.size or not array.ndim or array.dtype.kind not in "biuf":
            raise InvalidSamplesError(
                f"Samples of the input {name!r} need at least one row of numbers; got {array.dtype} "
                f"{list(array.shape)}."
            )
        tensor = torch.tensor(array)
        examples[name] = tensor.to(floating) if tensor.is_floating_point() else tensor
    return examples


def _check_first_run(module: torch.nn.Module, run: Run, examples: Rows) -> None:
    """A module must not fail on its samples, nor keep anything between two runs."""
    before = {name: (buffer, buffer._version) for name, buffer in module.named_buffers()}  # noqa: SLF001 counts changes
    try:
        run(examples)
    except Exception as error:  # a module raises what it likes
        raise UnsupportedModelError(f"The module itself fails on the samples: {cause(error)}") from error
    for name, buffer in module.named_buffers():
        if name not in before or before[name][0] is not buffer or before[name][1] != buffer._version:  # noqa: SLF001
            raise UnsupportedModelError(
                f"forward changes the buffer {name!r}, and a graph keeps nothing between two runs. Make it an input "
                "and an output of forward."
            )


@contextmanager
def _inference() -> Iterator[None]:
    """Without the shortcut of torch's transformer layers, whose answers differ where the input is padded."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), quiet():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def _evaluation(module: torch.nn.Module) -> Iterator[None]:
    """Every part of the module has its own mode back afterwards."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        with _inference():
            yield
    finally:
        for part, mode in modes:
            part.training = mode


def _leaves(structure: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:  # noqa: ANN401 nested dicts, lists and tensors
    """The tensors of a structure in torch.export's order, each with the keys that lead to it."""
    if isinstance(structure, torch.Tensor):
        yield path or ("output",), structure
    elif structure is not None:
        for key, value in _items(structure, path):
            # A position says nothing alone.
            yield from _leaves(value, (*path, key) if path or not key.isdecimal() else ("output", key))


def _items(structure: Any, path: tuple[str, ...]) -> Iterable[tuple[str, Any]]:  # noqa: ANN401 nested dicts, lists and tensors
    if isinstance(structure, Mapping):
        return [(str(key), value) for key, value in structure.items()]
    if is_dataclass(structure):
        return [(field.name, getattr(structure, field.name)) for field in fields(structure)]
    if isinstance(structure, tuple | list):
        return zip(getattr(structure, "_fields", map(str, range(len(structure)))), structure, strict=True)
    raise UnsupportedModelError(
        f"{'_'.join(path) or 'output'!r} is of type {type(structure).__name__}; a graph takes and gives tensors alone. "
        "Wrap the module in one that does, in a dict, a tuple or a dataclass."
    )


def _distinct(names: Iterable[str], taken: Iterable[str]) -> Iterator[str]:
    known = set(taken)
    for name in names:
        numbered = (f"{name}_{number}" for number in range(1, len(known) + 1))
        found = name if name not in known else next(candidate for candidate in numbered if candidate not in known)
        known.add(found)
        yield found
