"""A Keras model as a conversion sees it: named tensors in the model's own order, rows to try, and what it answers."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from os import PathLike
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray

from penstock.converters.errors import UnsupportedModelError
from penstock.converters.parity import Tensors
from penstock.converters.source import SourceTensor

_DATATYPES = {
    "bool": "BOOL",
    "uint8": "UINT8",
    "uint16": "UINT16",
    "uint32": "UINT32",
    "uint64": "UINT64",
    "int8": "INT8",
    "int16": "INT16",
    "int32": "INT32",
    "int64": "INT64",
    "float16": "FP16",
    "float32": "FP32",
    "float64": "FP64",
}


def load(path: str | PathLike[str]) -> Any:  # noqa: ANN401 Keras publishes no types
    """Loads a `.keras` file that `keras_archive.check_archive` has let pass. Raises `UnsupportedModelError`."""
    try:
        return keras.saving.load_model(path, compile=False, safe_mode=True)
    except Exception as error:  # Keras raises whatever the layer at fault raised
        raise UnsupportedModelError(
            f"Keras {keras.__version__} cannot load {path}: {error} Save the model with a Keras of at most this "
            "version."
        ) from error


class KerasSource:
    """A Sequential or Functional model. Raises `UnsupportedModelError` for others, and for inputs it cannot serve."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 Keras publishes no types
        if keras.backend.backend() != "tensorflow":
            raise UnsupportedModelError(
                f"Keras runs on {keras.backend.backend()} here; conversion needs TensorFlow. Save the model as .keras "
                "and "
                "convert the file in a process with KERAS_BACKEND=tensorflow."
            )
        if not isinstance(model, keras.Model):
            raise UnsupportedModelError(
                f"Expected a Keras 3 model or the path of a .keras file, got {type(model).__qualname__}."
            )
        if not getattr(model, "inputs", None):
            raise UnsupportedModelError(
                f"The model {model.name!r} does not say what its inputs are. Build it from keras.Input, as a "
                "Functional "
                ""
                ""
                ""
                "model or as a Sequential whose first layer is a keras.Input."
            )
        self._model = model
        is_sequential = isinstance(model, keras.Sequential)
        self._input_structure = model.inputs[0] if is_sequential else model.input
        self.inputs = _named_tensors(self._input_structure, "input", taken=())
        self.outputs = _named_tensors(
            model.outputs[0] if is_sequential else model.output, "output", taken={tensor.name for tensor in self.inputs}
        )
        for tensor in self.inputs:
            if not tensor.shape or tensor.shape[0] is not None:
                raise UnsupportedModelError(
                    f"Input {tensor.name!r} has the fixed shape {list(tensor.shape)}; its first axis must be the "
                    "batch, "
                    ""
                    ""
                    "of any "
                    "size. Give keras.Input a shape without the batch, and no batch_size."
                )

    @property
    def name(self) -> str:
        return str(self._model.name)

    @property
    def description(self) -> str:
        return f"keras {keras.__version__}"

    @property
    def layer_names(self) -> frozenset[str]:
        layers = self._model._flatten_layers(include_self=False)  # noqa: SLF001 `model.layers` stops at the first level
        return frozenset(layer.name for layer in layers)

    def call(self, *inputs: Any) -> list[Any]:  # noqa: ANN401 eager or symbolic TensorFlow tensors
        """Runs the model for inference. Inputs and outputs are in the order of `inputs` and `outputs`."""
        structure = _rebuilt(self._input_structure, iter(inputs))
        return [leaf for _, leaf in _leaves(self._model(structure, training=False))]

    def answer(self, rows: Tensors) -> dict[str, NDArray[Any]]:
        """Runs the model eagerly on the CPU. Raises whatever the model raises."""
        with tf.device("/CPU:0"), _rows_of_any_size():
            outputs = self.call(*(tf.convert_to_tensor(rows[tensor.name]) for tensor in self.inputs))
        return {tensor.name: np.asarray(output) for tensor, output in zip(self.outputs, outputs, strict=True)}

    def random_rows(self, shapes: Mapping[str, Sequence[int]], seed: int) -> dict[str, NDArray[Any]]:
        """Rows of the given shapes: standard normal numbers, and integers that every embedding of the model has."""
        random = np.random.default_rng(seed)
        top = self._integer_bound()
        rows: dict[str, NDArray[Any]] = {}
        for tensor in self.inputs:
            shape = tuple(shapes[tensor.name])
            if tensor.dtype.startswith("float"):
                rows[tensor.name] = random.standard_normal(shape).astype(tensor.dtype)
            else:
                rows[tensor.name] = random.integers(0, 2 if tensor.dtype == "bool" else top, shape).astype(tensor.dtype)
        return rows

    def own_rows(self) -> Mapping[str, Tensors]:
        return {}

    def _integer_bound(self) -> int:
        layers = self._model._flatten_layers(include_self=False)  # noqa: SLF001 `model.layers` stops at the first level
        return min((layer.input_dim for layer in layers if isinstance(layer, keras.layers.Embedding)), default=2)


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
        datatype = _DATATYPES.get(dtype)
        if datatype is None:
            raise UnsupportedModelError(
                f"The {kind} {name!r} is of type {dtype}, which cannot be converted; known are {', '.join(_DATATYPES)}."
            )
        if kind == "input" and (tensor.sparse or tensor.ragged):
            raise UnsupportedModelError(f"Input {name!r} is sparse or ragged; ONNX Runtime takes dense tensors only.")
        tensors.append(SourceTensor(name, dtype, datatype, tuple(tensor.shape)))
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
