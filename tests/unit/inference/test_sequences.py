"""Sequences on real graphs: an accumulator whose sum is implicit state, and models that show their controls."""

import asyncio
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from onnx import helper
from tests.integration.inference.graphs import Bundle, bundle_of, value

from penstock.inference.engine import Stop
from penstock.inference.inference import Inference, SequenceStep
from penstock.inference.sequences import SequenceLimits, SequenceScheduler, visible
from penstock.inference.signature import Signature
from penstock.inference.statistics import Statistics
from penstock.inference.tensors import Array
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import DeadlineError, InvalidFieldError, NotReadyError, PenstockError, WrongStateError

STATE = 'state { input_name: "sum_in" output_name: "sum_out" data_type: TYPE_FP32 dims: [1] %s }'
CONTROLS = """
    control_input { name: "start" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [0, 1] } }
    control_input { name: "ready" control { kind: CONTROL_SEQUENCE_READY int32_false_true: [-1, 5] } }
    control_input { name: "end" control { kind: CONTROL_SEQUENCE_END bool_false_true: [false, true] } }
    control_input { name: "id" control { kind: CONTROL_SEQUENCE_CORRID data_type: %s } }
"""


def accumulator() -> Bundle:
    """`sum_out` = `sum_in` + `x`; `total` is the same; `safe`[`x`] makes a run with an x above 99 fail."""
    axes: list[int | str] = ["batch", 1]
    return bundle_of(
        [
            helper.make_node("Add", ["sum_in", "x"], ["sum_out"]),
            helper.make_node("Cast", ["x"], ["index"], to=7),
            helper.make_node("Gather", ["table", "index"], ["zero"]),
            helper.make_node("Add", ["sum_out", "zero"], ["total"]),
        ],
        [value("x", "FP32", axes), value("sum_in", "FP32", axes)],
        [value("total", "FP32", axes), value("sum_out", "FP32", axes)],
        {"table": np.zeros(100, np.float32)},
    )


def controls(id_type: str) -> Bundle:
    """Gives back all controls, under names of their own."""
    types = {"start": "FP32", "ready": "INT32", "end": "BOOL", "id": id_type, "x": "FP32"}
    axes: list[int | str] = ["batch", 1]
    return bundle_of(
        [helper.make_node("Identity", [name], [f"{name}_out"]) for name in types],
        [value(name, datatype, axes) for name, datatype in types.items()],
        [value(f"{name}_out", datatype, axes) for name, datatype in types.items()],
    )


class Gated:
    """An engine on ONNX Runtime that notes its runs; each waits for the gate."""

    def __init__(self, bundle: Bundle, *, is_open: bool = True) -> None:
        self._session = onnxruntime.InferenceSession(bundle.files["model.onnx"])
        self.gate = threading.Semaphore(10_000 if is_open else 0)
        self.runs: list[dict[str, Array]] = []
        self.closed = False

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None) -> list[Array]:
        self.runs.append(dict(inputs))
        assert self.gate.acquire(timeout=20)
        try:
            answers: list[Array] = self._session.run(list(outputs), dict(inputs))
        except Exception as error:
            raise PenstockError(f"cannot compute: {error}") from error
        return answers

    def stopper(self) -> Stop:
        raise NotImplementedError

    def close(self) -> None:
        self.closed = True

    @property
    def sizes(self) -> list[int]:
        return [len(run["x"]) for run in self.runs]


class Fixture:
    def __init__(
        self,
        bundle: Bundle,
        batching: str,
        *,
        max_batch_size: int = 8,
        is_open: bool = True,
        limits: SequenceLimits | None = None,
        folder: Path | None = None,
        backend: str = "onnxruntime",
    ) -> None:
        self.config = text_format.Parse(
            f'backend: "{backend}" max_batch_size: {max_batch_size} sequence_batching {{ {batching} }}', ModelConfig()
        )
        signature = Signature.of(bundle.signature)
        self.visible = visible(signature, self.config)
        self.engine = Gated(bundle, is_open=is_open)
        self.statistics = Statistics()
        self.scheduler = SequenceScheduler(
            "Model 'sum' version 1",
            [self.engine],
            signature,
            self.config,
            limits or SequenceLimits(100, 100),
            self.statistics,
            folder,
        )

    def send(
        self, sequence: int | str, x: float, flags: str = "", *, rows: int = 1, timeout_us: int = 0
    ) -> "asyncio.Task[list[Array]]":
        step = SequenceStep(sequence, start="s" in flags, end="e" in flags)
        inputs = {"x": np.full((rows, 1), x, np.float32)}
        inference = Inference(inputs, tuple(self.visible.outputs), rows, sequence=step, timeout_us=timeout_us)
        return asyncio.create_task(self.scheduler.infer(inference))

    async def total(self, sequence: int | str, x: float, flags: str = "") -> float:
        return float((await self.send(sequence, x, flags))[0][0, 0])

    async def runs(self, count: int) -> None:
        """Returns when so many runs have begun."""
        async with asyncio.timeout(10):
            while len(self.engine.runs) < count:  # noqa: ASYNC110  # the engine's thread knows no event loop
                await asyncio.sleep(0.001)


def summing(batching: str = "", initial: str = "", **options: object) -> Fixture:
    return Fixture(accumulator(), f"{STATE % initial} {batching}", **options)  # type: ignore[arg-type]


def test_requests_see_neither_controls_nor_states() -> None:
    assert (list(summing().visible.inputs), list(summing().visible.outputs)) == (["x"], ["total"])
    config = summing().config
    config.output.add(name="sum_out")
    config.output.add(name="total")
    assert list(visible(Signature.of(accumulator().signature), config).outputs) == ["total", "sum_out"]


@pytest.mark.parametrize("strategy", ["", "direct {}", "oldest { max_candidate_sequences: 4 }"])
async def test_a_sequence_accumulates_and_starts_again(strategy: str) -> None:
    one = summing(strategy)
    assert [await one.total(7, 1, "s"), await one.total(7, 2), await one.total(7, 3)] == [1, 3, 6]
    assert await one.total(7, 10, "s") == 10
    assert await one.total(7, 1, "e") == 11
    with pytest.raises(InvalidFieldError, match=r"for sequence 7 .* must specify the START flag on the first request"):
        await one.total(7, 1)
    assert await one.total(7, 5, "se") == 5
    assert one.statistics.success.count == 6
    assert one.statistics.failures == {"OTHER": 1}
    await one.scheduler.close()
    assert one.engine.closed


async def test_steps_keep_their_order_and_sequences_share_batches() -> None:
    one = summing(is_open=False)
    first = one.send(1, 1, "s")
    await one.runs(1)
    rest = [one.send(sequence, x, "s" if x == 10 else "") for x in (10, 20, 30) for sequence in (2, 3, "text")]
    rest += [one.send(1, 2), one.send(1, 3, "e")]
    await asyncio.sleep(0)
    assert one.scheduler.pending == 11
    one.engine.gate.release(100)
    answers = [float(arrays[0][0, 0]) for arrays in await asyncio.gather(first, *rest)]
    assert answers == [1, *[10] * 3, *[30] * 3, *[60] * 3, 3, 6]
    assert one.engine.sizes == [1, 4, 4, 3]
    await one.scheduler.close()


async def test_a_batch_has_no_more_rows_than_the_model_allows_and_waits_for_the_preferred_number() -> None:
    one = summing(
        "oldest { max_candidate_sequences: 9 preferred_batch_size: [2, 3] max_queue_delay_microseconds: 300000 }",
        max_batch_size=4,
    )
    await asyncio.gather(*(one.send(sequence, 1, "s") for sequence in range(1, 6)))
    assert one.engine.sizes == [3, 2]
    lone = one.send(1, 1)
    await asyncio.sleep(0.01)
    assert one.engine.sizes == [3, 2]
    other = one.send(2, 1)
    await asyncio.gather(lone, other)
    assert one.engine.sizes == [3, 2, 2]
    assert await one.total(1, 1) == 3
    await one.scheduler.close()


async def test_a_model_without_batches_runs_one_step_at_a_time() -> None:
    bundle = bundle_of(
        [helper.make_node("Concat", ["past", "x"], ["present"], axis=0), helper.make_node("Size", ["present"], ["n"])],
        [value("x", "FP32", ["length", 1]), value("past", "FP32", ["past", 1])],
        [value("n", "INT64", []), value("present", "FP32", ["present", 1])],
    )
    state = """state { input_name: "past" output_name: "present" data_type: TYPE_FP32 dims: [-1, 1]
                       initial_state { data_type: TYPE_FP32 dims: [0, 1] zero_data: true name: "empty" } }"""
    one = Fixture(bundle, state, max_batch_size=0)
    answers = await asyncio.gather(
        *(one.send(s, 1, "s" if not i else "", rows=i + 1) for i in range(3) for s in (1, 2))
    )
    assert [int(arrays[0]) for arrays in answers] == [1, 1, 3, 3, 6, 6]
    await one.scheduler.close()


@pytest.mark.parametrize(
    ("id_type", "ids", "told"), [("UINT64", (7, 2**40), (7, 2**40)), ("BYTES", ("a", 9), ("a", "9"))]
)
async def test_the_model_is_told_of_each_row(
    id_type: str, ids: tuple[int | str, ...], told: tuple[int | str, ...]
) -> None:
    one = Fixture(controls(id_type), CONTROLS % f"TYPE_{id_type.replace('BYTES', 'STRING')}")
    outputs = list(one.visible.outputs)
    assert list(one.visible.inputs) == ["x"]
    answers = await asyncio.gather(one.send(ids[0], 1, "s"), one.send(ids[1], 1, "se"))
    rows = [{name: array.item() for name, array in zip(outputs, arrays, strict=True)} for arrays in answers]
    both = {"ready_out": 5, "start_out": 1, "x_out": 1}
    assert rows == [{**both, "end_out": False, "id_out": told[0]}, {**both, "end_out": True, "id_out": told[1]}]
    assert one.engine.sizes == [2]
    await one.scheduler.close()


@pytest.mark.parametrize("sequence_id", ["text", -1, 2**64])
async def test_an_id_that_the_model_cannot_be_told_is_refused(sequence_id: int | str) -> None:
    one = Fixture(controls("UINT64"), CONTROLS % "TYPE_UINT64")
    with pytest.raises(InvalidFieldError, match="UINT64"):
        await one.send(sequence_id, 1, "s")
    await one.scheduler.close()


async def test_a_python_model_finds_a_sequence_in_the_same_row_until_it_ends() -> None:
    one = Fixture(controls("INT32"), CONTROLS % "TYPE_INT32", backend="python", max_batch_size=2)
    await asyncio.gather(one.send(1, 1, "s"), one.send(2, 1, "s"))
    third = one.send(3, 1, "s")
    await one.send(2, 1, "e")
    run = one.engine.runs[1]
    assert (run["id"].ravel().tolist(), run["ready"].ravel().tolist()) == ([0, 2], [-1, 5])
    await third
    run = one.engine.runs[2]
    assert (run["id"].ravel().tolist(), run["ready"].ravel().tolist()) == ([0, 3], [-1, 5])
    await one.scheduler.close()


async def test_a_sequence_without_a_free_seat_waits_for_one() -> None:
    one = summing("oldest { max_candidate_sequences: 1 } max_sequence_idle_microseconds: 20000")
    assert await one.total(1, 1, "s") == 1
    # The first rests until it is dropped; then the second has its seat, and ends, and the third has it.
    assert [float(a[0][0, 0]) for a in await asyncio.gather(one.send(2, 2, "se"), one.send(3, 3, "s"))] == [2, 3]
    with pytest.raises(InvalidFieldError, match="START"):
        await one.total(1, 1)
    await one.scheduler.close()


@pytest.mark.parametrize(
    ("sequence_id", "rows", "match"), [(0, 1, "correlation ID"), ("", 1, "correlation ID"), (1, 2, "batch-size 1")]
)
async def test_what_is_no_step_is_refused(sequence_id: int | str, rows: int, match: str) -> None:
    one = summing()
    with pytest.raises(InvalidFieldError, match=match):
        await one.send(sequence_id, 1, "s", rows=rows)
    with pytest.raises(InvalidFieldError, match="correlation ID"):
        await one.scheduler.infer(Inference({"x": np.ones((1, 1), np.float32)}, ("total",), 1))
    await one.scheduler.close()


async def test_a_step_that_fails_leaves_its_sequence_and_its_batch_as_they_were() -> None:
    one = summing()
    await asyncio.gather(one.send(1, 1, "s"), one.send(2, 2, "s"))
    bad, good = await asyncio.gather(one.send(1, 500), one.send(2, 2), return_exceptions=True)
    assert isinstance(bad, PenstockError)
    assert isinstance(good, list)
    assert good[0].item() == 4
    with pytest.raises(PenstockError):
        await one.total(1, 500, "s")
    assert await one.total(1, 1) == 2
    # A START that fails begins nothing.
    start, following = await asyncio.gather(one.send(3, 500, "s"), one.send(3, 1), return_exceptions=True)
    assert isinstance(start, PenstockError)
    assert isinstance(following, InvalidFieldError)
    assert one.statistics.failures == {"BACKEND": 3, "OTHER": 1}
    await one.scheduler.close()


async def test_a_step_whose_caller_left_or_whose_time_passed_is_not_run() -> None:
    one = summing(is_open=False)
    first = one.send(1, 1, "s")
    await one.runs(1)
    left, late, last = one.send(1, 10), one.send(1, 20, timeout_us=1000), one.send(1, 2)
    unstarted = one.send(2, 1, "s")
    orphan = one.send(2, 1)
    await asyncio.sleep(0)
    left.cancel()
    unstarted.cancel()
    with pytest.raises(DeadlineError):
        await late
    one.engine.gate.release(100)
    assert [float(arrays[0].item()) for arrays in await asyncio.gather(first, last)] == [1, 3]
    with pytest.raises(InvalidFieldError, match="START"):
        await orphan
    assert one.statistics.failures == {"CANCELED": 2, "REJECTED": 1, "OTHER": 1}
    assert one.scheduler.pending == 0
    await one.scheduler.close()


async def test_a_running_step_whose_caller_left_is_finished() -> None:
    one = summing(is_open=False)
    first = one.send(1, 1, "s")
    await one.runs(1)
    first.cancel()
    one.engine.gate.release(100)
    assert await one.total(1, 2) == 3
    await one.scheduler.close()


async def test_idle_sequences_are_dropped_and_only_those() -> None:
    one = summing("max_sequence_idle_microseconds: 150000", is_open=False)
    busy = one.send(1, 1, "s")
    await one.runs(1)
    await asyncio.sleep(0.3)
    one.engine.gate.release(100)
    await busy
    assert await one.total(1, 1) == 2
    await asyncio.sleep(0.3)
    with pytest.raises(InvalidFieldError, match="START"):
        await one.total(1, 1)
    await one.scheduler.close()


async def test_sequences_and_steps_are_bounded() -> None:
    one = summing(limits=SequenceLimits(max_queue_size=2, max_sequences=2), is_open=False)
    running = one.send(1, 1, "s")
    await one.runs(1)
    waiting = [one.send(2, 1, "s")]
    await asyncio.sleep(0)
    with pytest.raises(NotReadyError, match="sequences running"):
        await one.send(3, 1, "s")
    waiting.append(one.send(1, 1))
    await asyncio.sleep(0)
    with pytest.raises(NotReadyError, match="waiting"):
        await one.send(1, 1)
    one.engine.gate.release(100)
    await asyncio.gather(running, *waiting)
    assert await one.total(2, 1, "e") == 2
    assert await one.total(3, 1, "s") == 1
    await one.scheduler.close()


async def test_closing_finishes_what_waits_and_takes_nothing_new() -> None:
    one = summing("oldest { max_candidate_sequences: 1 }", is_open=False)
    tasks = [one.send(1, 1, "s"), one.send(1, 2), one.send(2, 5, "s")]
    await one.runs(1)
    closing = asyncio.create_task(one.scheduler.close())
    await asyncio.sleep(0)
    with pytest.raises(NotReadyError, match="unloaded"):
        await one.send(1, 1)
    one.engine.gate.release(100)
    assert [float(arrays[0].item()) for arrays in await asyncio.gather(*tasks)] == [1, 3, 5]
    await closing
    assert one.engine.closed


async def test_the_first_state_is_the_configurations(tmp_path: Path) -> None:
    (tmp_path / "forty").write_bytes(np.float32(40).tobytes())
    initial = 'initial_state { data_type: TYPE_FP32 dims: [1] data_file: "%s" name: "i" }'
    one = summing(initial=initial % "forty", folder=tmp_path)
    assert [await one.total(1, 2, "s"), await one.total(1, 1), await one.total(1, 0, "s")] == [42, 43, 40]
    await one.scheduler.close()
    (tmp_path / "short").write_bytes(b"\0")
    for name, match in (
        ("../forty", "no path"),
        ("/etc/passwd", "no path"),
        ("..", "no path"),
        ("none", "no file"),
        ("short", "expected 4 bytes"),
    ):
        with pytest.raises(WrongStateError, match=match):
            summing(initial=initial % name, folder=tmp_path)


@pytest.mark.parametrize(
    ("batching", "match"),
    [
        ("iterative_sequence: true", "iterative_sequence"),
        ('control_input { name: "a" control { kind: CONTROL_SEQUENCE_START } }', "needs two values"),
        ('control_input { name: "a" control { kind: CONTROL_SEQUENCE_START fp32_false_true: [1] } }', "two values"),
        ('control_input { name: "a" control { kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_FP32 } }', "data_type"),
        ('control_input { name: "x" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } }', "the graph"),
        ('control_input { name: "a" }', "one control"),
        ('state { input_name: "sum_in" output_name: "sum_out" data_type: TYPE_INT32 dims: [1] }', "the graph has"),
        ('state { input_name: "sum_in" data_type: TYPE_FP32 dims: [1] }', "output_name"),
        ((STATE % "") * 2, "twice"),
        (STATE % "initial_state { data_type: TYPE_FP32 dims: [2] zero_data: true }", "of dims"),
        ("oldest { preferred_batch_size: [9] }", "preferred_batch_size"),
    ],
)
def test_a_configuration_that_cannot_be_served_says_why(batching: str, match: str) -> None:
    config = text_format.Parse(f"max_batch_size: 8 sequence_batching {{ {batching} }}", ModelConfig())
    signature = Signature.of(accumulator().signature)
    with pytest.raises(WrongStateError, match=match):
        SequenceScheduler("m", [], signature, config, SequenceLimits(1, 1), Statistics())
