"""One run of steps of different sequences: from their inputs and states to their answers and next states."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from time import perf_counter_ns

import numpy as np
import structlog

from penstock.inference.engine import Engine
from penstock.inference.inference import Inference, Run
from penstock.inference.instance import public_error
from penstock.inference.sequence_config import SequenceConfig, State, fits
from penstock.inference.tensors import Array
from penstock.rpc.errors import PenstockError

_log = structlog.get_logger("penstock.inference.sequences")

States = Mapping[str, Array]


@dataclass(frozen=True, slots=True)
class Row:
    """One step, and the states that it starts from, by the names of the graph's inputs. Nothing here is written to."""

    inference: Inference
    states: States


@dataclass(frozen=True, slots=True)
class Answer:
    """A step's wanted outputs, and the states that it leaves."""

    outputs: list[Array]
    states: States


Outcome = Answer | Exception


class SequenceRunner:
    """Runs steps on one engine. Knows no sequences: what it is given is all it knows, so it may live on a thread."""

    def __init__(self, engine: Engine, config: SequenceConfig) -> None:
        self._engine = engine
        self._config = config

    def run(self, title: str, rows: Sequence[Row | None]) -> list[tuple[Run, Outcome]]:
        """An outcome for each row that is not None, and the run that it came from.

        None holds a place in the batch for a sequence that has no step now. Rows that fail together are run again one
        by one, each in its place: only the step at fault fails.
        """
        steps = [row for row in rows if row is not None]
        run = Run(rows=len(steps), start_ns=perf_counter_ns())
        try:
            answers = self._together(rows, steps, run)
        except Exception as error:  # whatever it is, it belongs to the caller and not to this thread
            if len(steps) == 1:
                return [(run, public_error(title, error))]
            _log.warning("batch failed, running its steps one by one", version=title, error=str(error))
        else:
            return [(run, answer) for answer in answers]
        return [
            outcome
            for place, row in enumerate(rows)
            if row is not None
            for outcome in self.run(title, [*([None] * place if self._config.has_holes else []), row])
        ]

    def _together(self, rows: Sequence[Row | None], steps: Sequence[Row], run: Run) -> list[Answer]:
        config = self._config
        names = dict.fromkeys(name for row in steps for name in row.inference.outputs)
        names.update(dict.fromkeys(state.output for state in config.states))
        # A row that nobody sent takes another's data, with which the model can surely compute.
        full = [steps[0] if row is None else row for row in rows]
        inputs = {name: _joined([row.inference.inputs[name] for row in full]) for name in steps[0].inference.inputs}
        for state in config.states:
            inputs[state.input] = _joined([row.states[state.input] for row in full])
        sequence_steps = [None if row is None else row.inference.sequence for row in rows]
        for control in config.controls:
            inputs[control.name] = control.values(sequence_steps, batched=config.batched)
        run.gathered_ns = perf_counter_ns()
        arrays = dict(zip(names, self._engine.run(inputs, list(names)), strict=True))
        run.ran_ns = perf_counter_ns()
        if config.batched:
            for name, array in arrays.items():
                if array.shape[:1] != (len(rows),):
                    raise PenstockError(f"Output {name!r} has shape {list(array.shape)} for {len(rows)} rows.")
        places = [place for place, row in enumerate(rows) if row is not None]
        return [self._answer(row, place, len(rows), arrays) for place, row in zip(places, steps, strict=True)]

    def _answer(self, row: Row, place: int, count: int, arrays: Mapping[str, Array]) -> Answer:
        mine = slice(place, place + 1) if self._config.batched else ...
        states = {}
        for state in self._config.states:
            part = _checked(state, arrays[state.output][mine], batched=self._config.batched)
            # A view would keep the whole batch in memory for as long as the sequence lives.
            kept = part.copy() if count > 1 or state.output in row.inference.outputs else part
            kept.setflags(write=False)
            states[state.input] = kept
        return Answer([arrays[name][mine] for name in row.inference.outputs], states)


def _joined(arrays: list[Array]) -> Array:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _checked(state: State, array: Array, *, batched: bool) -> Array:
    shape = array.shape[1:] if batched else array.shape
    if array.dtype != state.datatype.dtype or not fits(shape, state.dims):
        raise PenstockError(
            f"State {state.output!r}: expected {state.datatype.name} with dims {list(state.dims)}; the model gave "
            f"{array.dtype} {list(shape)}."
        )
    return array
