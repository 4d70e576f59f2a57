"""Numbers in a configuration are bounded: what is above a limit is refused before anything is opened."""

from pathlib import Path

import pytest
from google.protobuf import text_format
from tests.integration.inference import graphs
from tests.unit.inference.test_opener import opened

from penstock.inference.config_limits import check_limits
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import WrongStateError

WARM_UP = 'model_warmup { name: "w" batch_size: %s count: %s inputs { key: "x" value { dims: %s } } }'
STATE = 'sequence_batching { state { input_name: "s" dims: %s initial_state { dims: %s } } }'
PADDING = 'parameters { key: "pad_buckets" value { string_value: "%s" } }'

# Each with the greatest number that is taken, and the field that its error names.
LIMITS = {
    "max_batch_size: %d": (65_536, "max_batch_size"),
    "instance_group { count: %d }": (64, "instance_group.count"),
    "instance_group { count: 63 } instance_group { count: %d }": (1, "instance_group.count, all groups together"),
    "dynamic_batching { priority_levels: %d }": (100, "priority_levels"),
    "dynamic_batching { default_queue_policy { max_queue_size: %d } }": (100_000, "max_queue_size"),
    "dynamic_batching { priority_queue_policy { key: 2 value { max_queue_size: %d } } }": (100_000, "max_queue_size"),
    "dynamic_batching { max_queue_delay_microseconds: %d }": (60_000_000, "max_queue_delay_microseconds"),
    "sequence_batching { max_sequence_idle_microseconds: %d }": (86_400_000_000, "max_sequence_idle_microseconds"),
    "sequence_batching { oldest { max_candidate_sequences: %d } }": (10_000, "max_candidate_sequences"),
    "sequence_batching { oldest { max_queue_delay_microseconds: %d } }": (60_000_000, "max_queue_delay_microseconds"),
    "sequence_batching { direct { max_queue_delay_microseconds: %d } }": (60_000_000, "max_queue_delay_microseconds"),
    STATE % ("[%d]", "[]"): (2**24 - 1, "elements of all states"),
    STATE % ("[-1]", "[2, %d]"): (2**23 - 1, "elements of all states"),
    WARM_UP % (1, "%d", "[4]"): (1_000, "model_warmup.count"),
    WARM_UP % (1, 1, "[0, %d]"): (2**26, "elements of model_warmup 'w'"),
    WARM_UP % ("%d", 1, "[4, 1024]"): (2**14, "elements of model_warmup 'w'"),
}


@pytest.mark.parametrize("config", LIMITS)
def test_a_number_is_taken_up_to_its_limit(config: str) -> None:
    most, field = LIMITS[config]
    check_limits(text_format.Parse(config % most, ModelConfig()))
    with pytest.raises(WrongStateError, match=f"The configuration's {field}.*: expected 0 to [0-9]+; got [0-9]+"):
        check_limits(text_format.Parse(config % (most + 1), ModelConfig()))


@pytest.mark.parametrize(
    "config",
    [
        "max_batch_size: -1",
        "instance_group { count: 2 } instance_group { count: -1 }",
        "sequence_batching { oldest { max_candidate_sequences: -1 } }",
        WARM_UP % (1, 1, "[-1]"),
    ],
)
def test_what_is_below_nothing_is_refused(config: str) -> None:
    with pytest.raises(WrongStateError, match=r"expected 0 to \d+; got -1"):
        check_limits(text_format.Parse(config, ModelConfig()))


@pytest.mark.parametrize(
    ("config", "field"),
    [
        (f"input {{ dims: {[1] * 65} }}", "number of dims of ''"),
        (f"output {{ reshape {{ shape: {[1] * 65} }} }}", "number of axes in reshape"),
        (WARM_UP % (1, 1, [1] * 65), "number of dims of input 'x' in model_warmup"),
        (STATE % ([1] * 65, []), "number of dims of state 's'"),
        ("ensemble_scheduling { %s }" % ("step {} " * 1001), "number of steps"),
        (PADDING % ",".join(["1"] * 1001), "number of lengths in parameter 'pad_buckets'"),
    ],
    ids=lambda text: text[:30],
)
def test_lists_are_bounded(config: str, field: str) -> None:
    with pytest.raises(WrongStateError, match=f"The configuration's {field}"):
        check_limits(text_format.Parse(config, ModelConfig()))


async def test_nothing_is_opened_for_a_configuration_above_its_limits(tmp_path: Path) -> None:
    torn = graphs.Bundle({"model.onnx": b"torn"}, graphs.scale(1).signature)
    with pytest.raises(WrongStateError, match="priority_levels: expected 0 to 100; got 2000000"):
        await opened(tmp_path, torn, "dynamic_batching { priority_levels: 2000000 }")
