"""What a model's `sequence_batching` asks for: controls, implicit state, and how many sequences run together."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from penstock.inference.inference import SequenceStep
from penstock.inference.model_config import DATATYPE_NAMES, PYTHON, backend_of
from penstock.inference.signature import Signature
from penstock.inference.tensors import BOOL, BYTES, DATATYPES, Array, Datatype, TensorError, decode_raw
from penstock.oip.model_config_pb2 import DataType, ModelConfig, ModelSequenceBatching
from penstock.rpc.errors import InvalidFieldError, WrongStateError

_Control = ModelSequenceBatching.Control

DEFAULT_IDLE_US = 1_000_000
_INT32, _FP32 = DATATYPES["INT32"], DATATYPES["FP32"]
_CORRID_TYPES = ("INT32", "INT64", "UINT32", "UINT64", "BYTES")


@dataclass(frozen=True)
class SequenceLimits:
    """Bounds of one version: steps that wait, and sequences that live, those that rest between two steps included."""

    max_queue_size: int
    max_sequences: int


@dataclass(frozen=True)
class Control:
    """An input that tells the model about a row's sequence: a flag as one of two values, or the sequence's id."""

    name: str
    kind: "_Control.Kind.ValueType"
    datatype: Datatype
    false_true: tuple[Any, Any]
    # The shape of one row: [1], unless the graph declares another rank.
    row_shape: tuple[int, ...]

    def values(self, steps: Sequence[SequenceStep | None], *, batched: bool) -> Array:
        """The input for these rows. None is a row that nobody sent."""
        elements = [self._value(step) for step in steps]
        array = np.empty(len(elements), self.datatype.dtype)
        array[:] = elements
        return array.reshape((len(elements), *self.row_shape) if batched else self.row_shape)

    def check_id(self, title: str, sequence_id: int | str) -> None:
        """Raises `InvalidFieldError` for an id that this input cannot tell the model."""
        if self.kind != _Control.CONTROL_SEQUENCE_CORRID or self.datatype is BYTES:
            return
        limits = np.iinfo(self.datatype.dtype)
        if isinstance(sequence_id, str) or not limits.min <= sequence_id <= limits.max:
            raise InvalidFieldError.of(
                "parameters[sequence_id]",
                f"{title} takes sequence ids as {self.datatype.name}: expected a number from {limits.min} to "
                f"{limits.max}; got {str(sequence_id)[:80]!r}",
            )

    def _value(self, step: SequenceStep | None) -> Any:  # noqa: ANN401  # an element of any datatype
        if self.kind == _Control.CONTROL_SEQUENCE_CORRID:
            if self.datatype is BYTES:
                return "" if step is None else str(step.id)
            return 0 if step is None else step.id
        if step is None:
            return self.false_true[False]
        if self.kind == _Control.CONTROL_SEQUENCE_START:
            return self.false_true[step.start]
        if self.kind == _Control.CONTROL_SEQUENCE_END:
            return self.false_true[step.end]
        return self.false_true[True]


@dataclass(frozen=True)
class State:
    """Arrays that live as long as a sequence: what the graph gives as `output` is its next `input`.

    `dims` are without the batch axis, −1 for a dynamic one. `initial` is one row, batch axis included if there is one.
    """

    input: str
    output: str
    datatype: Datatype
    dims: tuple[int, ...]
    initial: Array


@dataclass(frozen=True)
class SequenceConfig:
    """`sequence_batching`, checked. `max_batch_size` 0: no batch axis, one step a run."""

    max_batch_size: int
    idle_s: float
    delay_s: float
    # Ready steps for which no longer is waited.
    enough: int
    preferred: tuple[int, ...]
    # Sequences that one instance holds; further ones wait until one of those ends. None: no bound of its own.
    seats: int | None
    # Whether a sequence keeps its row of the batch for life, because the model may keep its state by that.
    fixed_rows: bool
    controls: tuple[Control, ...]
    states: tuple[State, ...]

    @property
    def batched(self) -> bool:
        return self.max_batch_size > 0

    @property
    def has_holes(self) -> bool:
        """Whether a run has rows for sequences without a step: to keep the others' rows, where the model can tell."""
        tells = any(control.kind == _Control.CONTROL_SEQUENCE_READY for control in self.controls)
        return self.fixed_rows and self.batched and tells

    def batch_limit(self, ready: int) -> int:
        """How many of `ready` steps to run together."""
        limit = max(1, self.max_batch_size)
        return max((size for size in self.preferred if size <= min(ready, limit)), default=limit)

    @classmethod
    def of(cls, config: ModelConfig, signature: Signature, initial_states: Path | None = None) -> "SequenceConfig":
        """Raises `WrongStateError` for a configuration that cannot be served.

        `signature` is the model's own where it has a graph; its controls' ranks hold. `initial_states` is the folder
        that Triton calls `initial_state`, beside the version's; None: there are no files.
        """
        batching = config.sequence_batching
        if batching.iterative_sequence:
            raise WrongStateError("The configuration's iterative_sequence is not served. Leave it out.")
        size = config.max_batch_size
        oldest = batching.WhichOneof("strategy_choice") == "oldest"
        preferred = tuple(sorted(batching.oldest.preferred_batch_size)) if oldest else ()
        if preferred and not 1 <= preferred[0] <= preferred[-1] <= max(1, size):
            raise WrongStateError(
                f"The configuration's preferred_batch_size needs sizes from 1 to max_batch_size {size}; got "
                f"{list(preferred)}."
            )
        # An ONNX graph keeps nothing between two runs; a Python model may, by instance and by row.
        fixed_rows = not oldest and backend_of(config) == PYTHON
        if oldest:
            seats = batching.oldest.max_candidate_sequences or None
            delay_us, enough = batching.oldest.max_queue_delay_microseconds, preferred[0] if preferred else max(1, size)
        else:
            seats = max(1, size) if fixed_rows else None
            delay_us = batching.direct.max_queue_delay_microseconds
            enough = max(1, math.ceil(min(1.0, batching.direct.minimum_slot_utilization) * size))
        return cls(
            max_batch_size=size,
            idle_s=(batching.max_sequence_idle_microseconds or DEFAULT_IDLE_US) / 1e6,
            delay_s=delay_us / 1e6,
            enough=enough,
            preferred=preferred,
            seats=seats,
            fixed_rows=fixed_rows,
            controls=_controls(config, signature),
            states=_states(config, signature, initial_states),
        )


def hidden_inputs(config: ModelConfig) -> frozenset[str]:
    """Inputs of the model that the server makes: controls and states. The configuration's `input` lists none."""
    batching = config.sequence_batching
    return frozenset((*(one.name for one in batching.control_input), *(one.input_name for one in batching.state)))


def hidden_outputs(config: ModelConfig) -> frozenset[str]:
    """Outputs of the model that only its state takes. A state that `output` lists is given to clients, too."""
    listed = {one.name for one in config.output}
    return frozenset(one.output_name for one in config.sequence_batching.state if one.output_name not in listed)


def visible(signature: Signature, config: ModelConfig) -> Signature:
    """What requests are checked against: the model's signature without controls and states.

    `config` is the owner's own, not yet completed from the graph, so that it does not list what the owner did not.
    Raises `WrongStateError` if nothing is left.
    """
    taken = [one for name, one in signature.inputs.items() if name not in hidden_inputs(config)]
    given = [one for name, one in signature.outputs.items() if name not in hidden_outputs(config)]
    if not (taken and given):
        raise WrongStateError(
            "The model has no inputs beside its controls and states, or no outputs beside its states. A state that "
            "clients are to see has to be listed in the configuration's output."
        )
    return Signature.made(taken, given)


def _controls(config: ModelConfig, signature: Signature) -> tuple[Control, ...]:
    controls: dict[int, Control] = {}
    for given in config.sequence_batching.control_input:
        if not given.name or len(given.control) != 1:
            raise WrongStateError(
                f"The configuration's control_input {given.name!r} needs a name and one control; got "
                f"{len(given.control)}."
            )
        control = _control(given.name, given.control[0], signature, batched=config.max_batch_size > 0)
        if control.kind in controls:
            raise WrongStateError(f"The configuration has two control_inputs of {_Control.Kind.Name(control.kind)}.")
        controls[control.kind] = control
    return tuple(controls.values())


def _control(name: str, control: _Control, signature: Signature, *, batched: bool) -> Control:
    if control.kind == _Control.CONTROL_SEQUENCE_CORRID:
        datatype_name = DATATYPE_NAMES.get(control.data_type, "")
        if datatype_name not in _CORRID_TYPES:
            raise WrongStateError(
                f"The configuration's control_input {name!r} needs a data_type of {', '.join(_CORRID_TYPES)} for the "
                f"sequence's id; got {DataType.Name(control.data_type)}."
            )
        datatype, pair = DATATYPES[datatype_name], (0, 0)
    else:
        pairs: list[tuple[Datatype, list[Any]]] = [
            (_INT32, list(control.int32_false_true)),
            (_FP32, list(control.fp32_false_true)),
            (BOOL, list(control.bool_false_true)),
        ]
        written = [(datatype, values) for datatype, values in pairs if values]
        if len(written) != 1 or len(written[0][1]) != 2:
            raise WrongStateError(
                f"The configuration's control_input {name!r} needs two values, for false and for true, in one of "
                f"int32_false_true, fp32_false_true and bool_false_true."
            )
        datatype, (false, true) = written[0]
        pair = (false, true)
    row_shape: tuple[int, ...] = (1,)
    if graph := signature.inputs.get(name):
        if graph.datatype is not datatype:
            raise WrongStateError(
                f"The configuration's control_input {name!r} is {datatype.name}; the graph has '{graph}'."
            )
        row_shape = (1,) * (len(graph.shape) - batched)
    return Control(name, control.kind, datatype, pair, row_shape)


def _states(config: ModelConfig, signature: Signature, folder: Path | None) -> tuple[State, ...]:
    states = [_state(one, signature, folder, config.max_batch_size > 0) for one in config.sequence_batching.state]
    for names in ([one.input for one in states], [one.output for one in states]):
        if len(set(names)) < len(names):
            raise WrongStateError(f"The configuration's states use a tensor twice: {', '.join(names)}.")
    return tuple(states)


def _state(state: ModelSequenceBatching.State, signature: Signature, folder: Path | None, batched: bool) -> State:
    title = f"The configuration's state {state.input_name!r}"
    if not (state.input_name and state.output_name and state.data_type in DATATYPE_NAMES):
        raise WrongStateError(f"{title} needs an input_name, an output_name and a data_type.")
    datatype = DATATYPES[DATATYPE_NAMES[state.data_type]]
    for graph in (signature.inputs.get(state.input_name), signature.outputs.get(state.output_name)):
        if graph is not None and (graph.datatype is not datatype or len(graph.shape) != len(state.dims) + batched):
            raise WrongStateError(f"{title} is {datatype.name} with dims {list(state.dims)}; the graph has '{graph}'.")
    initial = _initial(title, state, datatype, folder)
    if batched:
        initial = initial[np.newaxis]
    initial.setflags(write=False)
    return State(state.input_name, state.output_name, datatype, tuple(state.dims), initial)


def _initial(title: str, state: ModelSequenceBatching.State, datatype: Datatype, folder: Path | None) -> Array:
    if len(state.initial_state) > 1:
        raise WrongStateError(f"{title} needs one initial_state at most; got {len(state.initial_state)}.")
    # As in Triton, a dynamic axis is 1 until the graph makes it longer.
    shape = [max(1, dim) if dim < 0 else dim for dim in state.dims]
    for first in state.initial_state:
        if first.data_type not in (DataType.TYPE_INVALID, state.data_type):
            raise WrongStateError(f"{title}: its initial_state is of another data_type.")
        shape = list(first.dims) or shape
        if not fits(shape, state.dims) or any(axis < 0 for axis in shape):
            raise WrongStateError(
                f"{title}: expected initial_state of dims {list(state.dims)}, each known; got {list(first.dims)}."
            )
        if first.WhichOneof("state_data") == "data_file":
            return _read(title, first.data_file, datatype, shape, folder)
    return np.full(shape, "" if datatype is BYTES else 0, datatype.dtype)


def _read(title: str, name: str, datatype: Datatype, shape: Sequence[int], folder: Path | None) -> Array:
    """The first state in a file: raw as on the wire."""
    if not name or name != Path(name).name or name == "..":
        raise WrongStateError(f"{title}: expected the name of a file in folder initial_state, no path; got {name!r}.")
    if folder is None or not (path := folder / name).is_file():
        raise WrongStateError(f"{title}: the model has no file initial_state/{name}.")
    expected = math.prod(shape) * datatype.dtype.itemsize
    if datatype is not BYTES and path.stat().st_size != expected:
        raise WrongStateError(f"{title}: expected {expected} bytes in {name!r}; got {path.stat().st_size}.")
    try:
        return decode_raw(datatype, shape, path.read_bytes())
    except (TensorError, OSError) as error:
        raise WrongStateError(f"{title}: file {name!r} cannot be read: {error}.") from error


def fits(shape: Sequence[int], dims: Sequence[int]) -> bool:
    """Whether a shape is one of those that dims allow, where −1 allows any."""
    return len(shape) == len(dims) and all(dim in (-1, axis) for axis, dim in zip(shape, dims, strict=True))
