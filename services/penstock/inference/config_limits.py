"""How large the numbers in a model's configuration may be.

Configurations come from anybody: with the registry's bundles, and with requests to load a model. Their numbers become
instances, runs and arrays, so they are compared with limits before anything is opened. docs/operations.md lists these.
"""

from collections.abc import Iterator, Sequence
from math import prod

from penstock.inference.padding import BUCKETS
from penstock.oip.model_config_pb2 import (
    ModelConfig,
    ModelDynamicBatching,
    ModelInput,
    ModelOutput,
    ModelSequenceBatching,
    ModelWarmup,
)
from penstock.rpc.errors import WrongStateError

MAX_BATCH_SIZE = 65_536
# Each is a session, or an object of the operator's class, and a thread.
MAX_INSTANCES = 64
MAX_PRIORITY_LEVELS = 100
MAX_QUEUE_SIZE = 100_000
# A minute, for a batch to fill.
MAX_QUEUE_DELAY_US = 60_000_000
MAX_CANDIDATE_SEQUENCES = 10_000
# A day, of a client that went without a word.
MAX_SEQUENCE_IDLE_US = 86_400_000_000
# All samples with all their repetitions.
MAX_WARMUP_RUNS = 1_000
# Of one sample's inputs, of all first states: half a GiB and an eighth, where an element takes eight bytes.
MAX_WARMUP_ELEMENTS = 2**26
MAX_STATE_ELEMENTS = 2**24
# numpy's.
MAX_AXES = 64
MAX_ENSEMBLE_STEPS = 1_000
MAX_PAD_BUCKETS = 1_000

# A field's name, what came, and the most that is taken; the least is always 0.
_Number = tuple[str, int, int]


def check_limits(config: ModelConfig) -> None:
    """Raises `WrongStateError` for a number that is too large, or negative."""
    for field, came, most in _numbers(config):
        if not 0 <= came <= most:
            raise WrongStateError(f"The configuration's {field}: expected 0 to {most}; got {came}.")


def _numbers(config: ModelConfig) -> Iterator[_Number]:
    yield "max_batch_size", config.max_batch_size, MAX_BATCH_SIZE
    for group in config.instance_group:
        yield "instance_group.count", group.count, MAX_INSTANCES
    instances = sum(max(1, group.count) for group in config.instance_group)
    yield "instance_group.count, all groups together", instances, MAX_INSTANCES
    tensors: list[ModelInput | ModelOutput] = [*config.input, *config.output]
    for tensor in tensors:
        yield f"number of dims of {tensor.name[:80]!r}", len(tensor.dims), MAX_AXES
        yield f"number of axes in reshape of {tensor.name[:80]!r}", len(tensor.reshape.shape), MAX_AXES
    yield "number of steps in ensemble_scheduling", len(config.ensemble_scheduling.step), MAX_ENSEMBLE_STEPS
    buckets = config.parameters[BUCKETS].string_value if BUCKETS in config.parameters else ""
    yield f"number of lengths in parameter {BUCKETS!r}", buckets.count(",") + 1, MAX_PAD_BUCKETS
    yield from _of_batching(config.dynamic_batching)
    yield from _of_sequences(config.sequence_batching)
    yield from _of_warm_up(config.model_warmup)


def _of_batching(batching: ModelDynamicBatching) -> Iterator[_Number]:
    yield "priority_levels", batching.priority_levels, MAX_PRIORITY_LEVELS
    yield "max_queue_delay_microseconds", batching.max_queue_delay_microseconds, MAX_QUEUE_DELAY_US
    for policy in (batching.default_queue_policy, *batching.priority_queue_policy.values()):
        yield "max_queue_size", policy.max_queue_size, MAX_QUEUE_SIZE


def _of_sequences(batching: ModelSequenceBatching) -> Iterator[_Number]:
    yield "max_sequence_idle_microseconds", batching.max_sequence_idle_microseconds, MAX_SEQUENCE_IDLE_US
    yield "max_candidate_sequences", batching.oldest.max_candidate_sequences, MAX_CANDIDATE_SEQUENCES
    for delay_us in (batching.oldest.max_queue_delay_microseconds, batching.direct.max_queue_delay_microseconds):
        yield "max_queue_delay_microseconds", delay_us, MAX_QUEUE_DELAY_US
    elements = 0
    for state in batching.state:
        for dims in (state.dims, *(first.dims for first in state.initial_state)):
            yield f"number of dims of state {state.input_name[:80]!r}", len(dims), MAX_AXES
            elements += _elements(dims)
    yield "elements of all states together", elements, MAX_STATE_ELEMENTS


def _of_warm_up(samples: Sequence[ModelWarmup]) -> Iterator[_Number]:
    yield "model_warmup.count, all samples together", sum(max(1, one.count) for one in samples), MAX_WARMUP_RUNS
    for sample in samples:
        for name, tensor in sample.inputs.items():
            yield f"number of dims of input {name[:80]!r} in model_warmup", len(tensor.dims), MAX_AXES
            yield f"dims of input {name[:80]!r} in model_warmup", min(tensor.dims, default=0), MAX_WARMUP_ELEMENTS
        elements = sum(_elements(one.dims) for one in sample.inputs.values()) * max(1, sample.batch_size)
        yield f"elements of model_warmup {sample.name[:80]!r}", elements, MAX_WARMUP_ELEMENTS


def _elements(dims: Sequence[int]) -> int:
    """An axis that is dynamic or empty counts as one: also an empty array has bounds to its other axes."""
    return prod(max(1, dim) for dim in dims)
