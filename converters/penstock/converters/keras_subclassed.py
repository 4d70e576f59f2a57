"""A model without inputs of its own, subclassed above all, as a Functional one that calls it."""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import keras
import numpy as np
from numpy.typing import NDArray

from penstock.converters.errors import UnsupportedModelError, said_by
from penstock.converters.source import TEXT

Model = Any  # Keras publishes no types
Samples = Mapping[str, NDArray[Any]]

_CONTEXT = {"training", "mask"}
"""Arguments of a call that Keras fills itself."""

# They read integers or texts, which Keras does not keep of a call.
_TYPED_READERS = (
    keras.layers.CategoryEncoding,
    keras.layers.Embedding,
    keras.layers.HashedCrossing,
    keras.layers.Hashing,
    keras.layers.IntegerLookup,
    keras.layers.StringLookup,
    keras.layers.TextVectorization,
)


def functional(model: Model, samples: Samples | None) -> Model:
    """A Functional model of one call. Raises `UnsupportedModelError` if what the call takes is not known.

    Shapes are those that the model was built with, else the samples'; rows come in any number. Datatypes are the
    samples', else the model's own for floating point: Keras keeps shapes only.
    """
    arguments = _arguments(model, samples)
    try:
        outputs = model(*arguments.values()) if len(arguments) == 1 else model(**arguments)
    except Exception as error:  # a model raises what it likes
        raise UnsupportedModelError(
            f"The call of {model.name!r} cannot be traced: {said_by(error)} Use keras.ops in it, and no Python values "
            "of tensors."
        ) from error
    inputs = next(iter(arguments.values())) if len(arguments) == 1 else arguments
    if not isinstance(outputs, dict):  # else they would have the model's name, which Keras counts on
        taken: set[str] = set()
        outputs = {_numbered("output", taken): output for output in keras.tree.flatten(outputs)}
    return keras.Model(inputs, outputs, name=model.name)


def _arguments(model: Model, samples: Samples | None) -> dict[str, Any]:
    """A structure of inputs for each argument of the call."""
    parameters = _parameters(model)
    built, given = _built_shapes(model, parameters), _sampled_shapes(samples or {}, parameters)
    required = {name for name, parameter in parameters.items() if parameter.default is parameter.empty}
    shapes = next((known for known in (built, given) if known and required <= known.keys()), None)
    if shapes is None:
        raise UnsupportedModelError(
            f"The model {model.name!r} does not say what its inputs are. Call it once on a batch that is its only "
            f"argument, or give samples with the names of what its call takes: {', '.join(parameters)}. Or build it "
            "from keras.Input, as a Functional model or as a Sequential whose first layer is a keras.Input."
        )
    if samples is None and (readers := [layer.name for layer in _layers(model) if isinstance(layer, _TYPED_READERS)]):
        raise UnsupportedModelError(
            f"Keras keeps no datatypes of a call, and layers of {model.name!r} take others than floating point: "
            f"{', '.join(readers)}. Give samples of its inputs."
        )
    taken: set[str] = set()

    def inputs(shape: Any, argument: str, path: tuple[str | int, ...]) -> Any:  # noqa: ANN401 nested dicts and lists
        if isinstance(shape, dict):
            return {key: inputs(value, argument, (*path, key)) for key, value in shape.items()}
        if not all(size is None or isinstance(size, int) for size in shape):
            return [inputs(value, argument, (*path, index)) for index, value in enumerate(shape)]
        has_keys = any(isinstance(key, str) for key in path)
        name = _numbered("_".join(map(str, path)) if has_keys else argument, taken)
        return keras.Input(tuple(shape[1:]), dtype=_dtype(model, (samples or {}).get(name)), name=name)

    return {name: inputs(shape, name, () if len(shapes) == 1 else (name,)) for name, shape in shapes.items()}


def _parameters(model: Model) -> dict[str, inspect.Parameter]:
    return {
        name: parameter
        for name, parameter in inspect.signature(model.call).parameters.items()
        if name not in _CONTEXT and parameter.kind not in {parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD}
    }


def _layers(model: Model) -> Iterable[Any]:
    return model._flatten_layers(include_self=False)  # type: ignore[no-any-return]  # noqa: SLF001 `model.layers` stops at the first level


def _built_shapes(model: Model, parameters: Iterable[str]) -> dict[str, Any]:
    """What `build` was called with: a shape of the first argument, or one named for each."""
    shapes = {name: shape for name, shape in (model._build_shapes_dict or {}).items() if shape is not None}  # noqa: SLF001 Keras tells it by no other way
    if len(shapes) == 1:
        return dict(zip(parameters, shapes.values(), strict=False))
    return {name.removesuffix("_shape"): shape for name, shape in shapes.items()}


def _sampled_shapes(samples: Samples, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """Samples are named like arguments of the call, or are parts of its only one."""
    shapes = {name: np.shape(array) for name, array in samples.items()}
    if shapes.keys() <= parameters.keys():
        return shapes
    return {next(iter(parameters)): shapes} if parameters else {}


def _dtype(model: Model, sample: NDArray[Any] | None) -> str:
    """Of floating point it is the model's own, whatever NumPy made of the numbers."""
    dtype = np.asarray(sample).dtype if sample is not None else np.dtype(np.float32)
    if dtype.kind == "f":
        return str(model.variable_dtype)
    return TEXT if dtype.kind in "OSU" else dtype.name


def _numbered(name: str, taken: set[str]) -> str:
    candidates = (f"{name}_{number}" for number in range(1, len(taken) + 1))
    free = name if name not in taken else next(candidate for candidate in candidates if candidate not in taken)
    taken.add(free)
    return free
