"""A Keras model as a conversion sees it: named tensors in the model's own order, rows to try, and what it answers."""

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from os import PathLike
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from keras.src.utils.backend_utils import TFGraphScope
from numpy.typing import NDArray

from penstock.converters import keras_subclassed
from penstock.converters.errors import UnsupportedModelError
from penstock.converters.keras_rows import random_row_values
from penstock.converters.parity import Tensors
from penstock.converters.source import DATATYPES, SourceTensor, as_text

_LAYERS_NAMED = 5
_FOREIGN_DATATYPES = {"bfloat16", "float8"}


def load(path: str | PathLike[str]) -> Any:  # noqa: ANN401 Keras publishes no types
    """Loads a `.keras` file that `keras_archive.check_archive` has let pass. Raises `UnsupportedModelError`."""
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises whatever the layer at fault raised
        raise UnsupportedModelError(
            f"Keras {keras.__version__} cannot load {path}: {error} It is damaged, or a newer Keras saved it: then "
            "save it with one of at most this version."
        ) from error


class KerasSource:
    """A Keras model; samples tell what one without inputs of its own takes.

    Raises `UnsupportedModelError` for inputs that are not known or cannot be served.
    """

    def __init__(self, model: Any, samples: Tensors | None = None) -> None:  # noqa: ANN401 Keras publishes no types
        if keras.backend.backend() != "tensorflow":
            raise UnsupportedModelError(
                f"Keras runs on {keras.backend.backend()} here; conversion needs TensorFlow. Save the model as .keras "
                "and convert the file in a process with KERAS_BACKEND=tensorflow."
            )
        if not isinstance(model, keras.Model):
            raise UnsupportedModelError(
                f"Expected a Keras 3 model or the path of a .keras file, got {type(model).__qualname__}."
            )
        if not getattr(model, "inputs", None):
            model = keras_subclassed.functional(model, samples)
        _refuse_datatypes(model)
        self._model = model
        is_sequential = isinstance(model, keras.Sequential)
        self._input_structure = model.inputs[0] if is_sequential else model.input
        self.inputs = _named_tensors(self._input_structure, "input", taken=())
        self.outputs = _named_tensors(
            model.outputs[0] if is_sequential else model.output, "output", taken={tensor.name for tensor in self.inputs}
        )
        if any(layer.compute_dtype == "float16" for layer in self.layers):
            self.outputs = tuple(replace(tensor, precision="float16") for tensor in self.outputs)
        for tensor in self.inputs:
            if not tensor.shape or tensor.shape[0] is not None:
                raise UnsupportedModelError(
                    f"Input {tensor.name!r} has the fixed shape {list(tensor.shape)}; its first axis must be the "
                    "batch, of any size. Give keras.Input a shape without the batch, and no batch_size; to a "
                    "Sequential without an Input, `build` with None for the batch before it is called."
                )

    @property
    def name(self) -> str:
        return str(self._model.name)

    @property
    def description(self) -> str:
        return f"keras {keras.__version__}"

    @property
    def layers(self) -> list[Any]:
        """The layers of all levels."""
        return list(self._model._flatten_layers(include_self=False))  # noqa: SLF001 `model.layers` stops at the first level

    @property
    def layer_names(self) -> frozenset[str]:
        return frozenset(layer.name for layer in self.layers)

    def weights(self, size_bytes: int) -> list[Any]:
        """The model's variables of at least this size."""
        return [
            weight
            for weight in self._model.variables
            if math.prod(weight.shape) * np.dtype(weight.dtype).itemsize >= size_bytes
        ]

    def call(self, *inputs: Any) -> list[Any]:  # noqa: ANN401 eager or symbolic TensorFlow tensors
        """Runs the model for inference. Inputs and outputs are in the order of `inputs` and `outputs`."""
        structure = _rebuilt(self._input_structure, iter(inputs))
        # `predict` runs in a graph, where preprocessing layers compute in floating point what they round otherwise.
        with TFGraphScope():
            return [leaf for _, leaf in _leaves(self._model(structure, training=False))]

    def answer(self, rows: Tensors) -> dict[str, NDArray[Any]]:
        """Runs the model on the CPU as `predict` does. Raises whatever the model raises."""
        with tf.device("/CPU:0"), _rows_of_any_size():
            outputs = self._predict(*(tf.convert_to_tensor(rows[tensor.name]) for tensor in self.inputs))
        return {tensor.name: _array(output) for tensor, output in zip(self.outputs, outputs, strict=True)}

    @cached_property
    def _predict(self) -> Callable[..., list[Any]]:
        """`call` in a graph, in half the time; without one where sizes change, which not every layer learns there."""
        if any(None in tensor.shape[1:] for tensor in self.inputs):
            return self.call
        function = tf.function(self.call, autograph=False)
        specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in self.inputs]
        try:
            traced: Callable[..., list[Any]] = function.get_concrete_function(*specs)
        except Exception:  # a layer raises what it likes
            return self.call
        return traced

    def random_rows(self, shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, NDArray[Any]]:
        """Rows of the given shapes, of values that the layers reading them know."""
        random = np.random.default_rng(seed)
        leaves = [leaf for _, leaf in _leaves(self._input_structure)]
        return {
            tensor.name: random_row_values(tensor.dtype, shapes[tensor.name], self._readers(leaf), random)
            for tensor, leaf in zip(self.inputs, leaves, strict=True)
        }

    def close(self) -> None:
        """Nothing runs."""

    def own_rows(self) -> Mapping[str, Tensors]:
        return {}

    def _readers(self, leaf: Any) -> list[Any]:  # noqa: ANN401 a Keras tensor
        """The layers that read an input themselves, and then all others: those inside of layers have no history."""
        first = [layer for layer in self.layers if any(leaf is read for read in _inputs_of(layer))]
        return first + [layer for layer in self.layers if layer not in first]


def _refuse_datatypes(model: Any) -> None:  # noqa: ANN401 Keras publishes no types
    """Those that ONNX Runtime has hardly an operator of on a CPU."""
    used: dict[str, list[str]] = {}
    for layer in model._flatten_layers(include_self=False):  # noqa: SLF001 `model.layers` stops at the first level
        for dtype in {layer.compute_dtype, layer.variable_dtype, layer.quantization_mode} & _FOREIGN_DATATYPES:
            used.setdefault(dtype, []).append(layer.name)
    for dtype, names in used.items():
        listed = ", ".join(names[:_LAYERS_NAMED]) + (", …" if len(names) > _LAYERS_NAMED else "")
        raise UnsupportedModelError(
            f"Layers of {model.name!r} compute in {dtype}, which ONNX Runtime has not on a CPU: {listed}. Build the "
            "model after keras.config.set_dtype_policy('float32') or 'mixed_float16', and give it the weights with "
            "set_weights."
        )


def _inputs_of(layer: Any) -> Iterator[Any]:  # noqa: ANN401 Keras publishes no types
    for node in layer._inbound_nodes:  # noqa: SLF001 Keras tells it by no other way
        yield from node.input_tensors


@contextmanager
def _rows_of_any_size() -> Iterator[None]:
    """Some layers trace a function for each size of a batch; TensorFlow's advice about it is not for the user."""
    logger = logging.getLogger("tensorflow")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _named_tensors(structure: Any, kind: str, taken: Iterable[str]) -> tuple[SourceTensor, ...]:  # noqa: ANN401 nested dicts, lists and tensors
    tensors: list[SourceTensor] = []
    names = set(taken)
    for path, tensor in _leaves(structure):
        name = _unique(_own_name(path, tensor, kind), names)
        names.add(name)
        dtype = keras.backend.standardize_dtype(tensor.dtype)
        if dtype not in DATATYPES:
            raise UnsupportedModelError(
                f"The {kind} {name!r} is of type {dtype}, which cannot be converted; known are {', '.join(DATATYPES)}."
            )
        if kind == "input" and (tensor.sparse or tensor.ragged):
            raise UnsupportedModelError(f"Input {name!r} is sparse or ragged; ONNX Runtime takes dense tensors only.")
        tensors.append(SourceTensor(name, dtype, tuple(tensor.shape)))
    return tuple(tensors)


def _own_name(path: tuple[str | int, ...], tensor: Any, kind: str) -> str:  # noqa: ANN401 Keras publishes no types
    """The key under which the user knows the tensor, else the name of the layer that makes it."""
    if any(isinstance(key, str) for key in path):
        return "_".join(map(str, path))
    layer = str(tensor._keras_history.operation.name)  # noqa: SLF001 Keras gives a tensor's layer by no other way
    return kind if layer.startswith("keras_tensor") else layer


def _unique(name: str, taken: set[str]) -> str:
    numbered = (f"{name}_{number}" for number in range(1, len(taken) + 1))
    return name if name not in taken else next(candidate for candidate in numbered if candidate not in taken)


def _leaves(structure: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:  # noqa: ANN401 nested dicts, lists and tensors
    """The tensors of a structure in its own order; `keras.tree` would sort the keys of dicts."""
    if isinstance(structure, dict):
        for key, value in structure.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(structure, list | tuple):
        for index, value in enumerate(structure):
            yield from _leaves(value, (*path, index))
    else:
        yield path, structure


def _rebuilt(structure: Any, values: Iterator[Any]) -> Any:  # noqa: ANN401 nested dicts, lists and tensors
    if isinstance(structure, dict):
        return {key: _rebuilt(value, values) for key, value in structure.items()}
    if isinstance(structure, list | tuple):
        return [_rebuilt(value, values) for value in structure]
    return next(values)


def _array(output: Any) -> NDArray[Any]:  # noqa: ANN401 an eager TensorFlow tensor
    array = np.asarray(output)
    return as_text(array) if array.dtype == object else array
