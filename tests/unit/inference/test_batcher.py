"""Batches: who runs with whom, who never runs, and who gets which answer."""

import asyncio
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import pytest
from tests.unit.inference.gated import POISON, GatedEngine, signature_message

from penstock.inference.batch_options import BatchOptions, QueuePolicy
from penstock.inference.batcher import Batcher
from penstock.inference.engine import Stop
from penstock.inference.inference import Inference
from penstock.inference.instance import Instance
from penstock.inference.padding import Padding
from penstock.inference.signature import Signature
from penstock.inference.statistics import Statistics
from penstock.inference.tensors import Array
from penstock.rpc.errors import DeadlineError, NotReadyError, PenstockError

QUEUE = 6
OPTIONS = BatchOptions(max_batch_size=4, default_policy=QueuePolicy(max_queue_size=QUEUE))


def rows(value: float, count: int = 1, width: int = 2, outputs: tuple[str, ...] = ("scaled",)) -> Inference:
    return Inference({"rows": np.full((count, width), value, np.float32)}, outputs, count)


def batcher_of(
    *engines: GatedEngine, options: BatchOptions = OPTIONS, batch: str = "batch", loop_rows: int = 0
) -> Batcher:
    signature = Signature.of(signature_message(batch))
    instances = [Instance(engine, signature, options.padding, loop_rows) for engine in engines]
    return Batcher("Model 'm' version 1", instances, signature, options, Statistics())


async def busy(engine: GatedEngine, batcher: Batcher) -> asyncio.Task[list[Array]]:
    """Occupies the engine with a first request, so that what follows has to wait."""
    first = asyncio.create_task(batcher.infer(rows(0)))
    async with asyncio.timeout(10):
        while not engine.runs:  # noqa: ASYNC110  # the engine's thread announces nothing
            await asyncio.sleep(0.001)
    return first


async def enqueued(batcher: Batcher, *inferences: Inference) -> list[asyncio.Task[list[Array]]]:
    tasks = [asyncio.create_task(batcher.infer(inference)) for inference in inferences]
    await asyncio.sleep(0)
    return tasks


def sizes(engine: GatedEngine) -> list[int]:
    return [len(run) for run in engine.runs]


async def test_an_idle_engine_runs_at_once_and_a_busy_one_gathers_rows() -> None:
    engine = GatedEngine()
    batcher = batcher_of(engine)
    first = await busy(engine, batcher)
    waiting = await enqueued(batcher, rows(1), rows(2, 2), rows(3, 2), rows(4), rows(5, 4))
    engine.open()
    answers = await asyncio.gather(first, *waiting)
    # Rows are counted, not requests: the third request does not fit beside the first two, the fourth does.
    assert sizes(engine) == [1, 4, 2, 4]
    assert [answer[0].tolist() for answer in answers[1:]] == [
        [[2 * value] * 2] * count for value, count in ((1, 1), (2, 2), (3, 2), (4, 1), (5, 4))
    ]
    await batcher.close()
    assert engine.closed


async def test_only_equal_row_shapes_share_a_batch_and_nobody_is_passed_over_for_ever() -> None:
    engine = GatedEngine()
    batcher = batcher_of(engine)
    first = await busy(engine, batcher)
    waiting = await enqueued(batcher, rows(1), rows(2, width=3), rows(3), rows(4, width=3))
    engine.open()
    await asyncio.gather(first, *waiting)
    assert [run.shape for run in engine.runs[1:]] == [(2, 2), (2, 3)]
    await batcher.close()


async def test_a_model_without_a_batch_axis_runs_one_request_at_a_time() -> None:
    engine = GatedEngine()
    batcher = batcher_of(engine, batch="rows", options=replace(OPTIONS, max_batch_size=0))
    first = await busy(engine, batcher)
    waiting = await enqueued(batcher, rows(1), rows(2), rows(3, 5))
    engine.open()
    answers = await asyncio.gather(first, *waiting)
    assert sizes(engine) == [1, 1, 1, 5]
    assert answers[3][0].shape == (5, 2)
    await batcher.close()


async def test_each_request_gets_the_outputs_it_wants_in_its_order() -> None:
    engine = GatedEngine()
    batcher = batcher_of(engine)
    first = await busy(engine, batcher)
    waiting = await enqueued(batcher, rows(1, outputs=("count",)), rows(2, outputs=("count", "scaled")), rows(3, 0))
    engine.open()
    _, counts, both, none = await asyncio.gather(first, *waiting)
    assert [array.tolist() for array in counts] == [[[1]]]
    assert [array.tolist() for array in both] == [[[1]], [[4, 4]]]
    assert none[0].shape == (0, 2)
    await batcher.close()


async def test_whoever_left_is_not_run() -> None:
    engine = GatedEngine()
    batcher = batcher_of(engine)
    first = await busy(engine, batcher)
    gone, stays = await enqueued(batcher, rows(1), rows(2))
    gone.cancel()
    engine.open()
    await asyncio.gather(first, stays)
    assert [run.tolist() for run in engine.runs[1:]] == [[[2, 2]]]
    assert gone.cancelled()
    await batcher.close()


async def test_leaving_during_the_run_disturbs_nobody() -> None:
    engine = GatedEngine()
    batcher = batcher_of(engine)
    first = await busy(engine, batcher)
    first.cancel()
    (stays,) = await enqueued(batcher, rows(2))
    engine.open()
    assert (await stays)[0].tolist() == [[4, 4]]
    await batcher.close()


async def test_a_full_queue_refuses_and_those_who_left_do_not_count() -> None:
    engine = GatedEngine()
    batcher = batcher_of(engine)
    first = await busy(engine, batcher)
    waiting = await enqueued(batcher, *[rows(value) for value in range(QUEUE)])
    with pytest.raises(NotReadyError, match="'m' version 1 has 6 requests waiting, as many as max_queue_size allows"):
        await batcher.infer(rows(9))
    waiting[0].cancel()
    await asyncio.sleep(0)
    (late,) = await enqueued(batcher, rows(9))
    engine.open()
    await asyncio.gather(first, late, *waiting[1:])
    await batcher.close()


@pytest.mark.parametrize("why", ["left", "expired", "left behind all others"])
async def test_a_request_that_nobody_waits_for_holds_no_tensors(why: str) -> None:
    engine = GatedEngine()
    policy = QueuePolicy(QUEUE, timeout_us=1, delays=True) if why.endswith("others") else QueuePolicy(QUEUE)
    batcher = batcher_of(engine, options=replace(OPTIONS, default_policy=policy))
    first = await busy(engine, batcher)
    request = rows(1)
    if why == "expired":
        request.timeout_us = 1
    tensor = weakref.ref(request.inputs["rows"])
    gone, stays = await enqueued(batcher, request, rows(2))
    del request
    assert batcher.pending == 2
    await asyncio.sleep(0.01)
    if why != "expired":
        gone.cancel()
    await asyncio.wait([gone])
    assert gone.cancelled() or isinstance(gone.exception(), DeadlineError)
    del gone
    assert batcher.pending == 1
    assert tensor() is None
    engine.open()
    await asyncio.gather(first, stays)
    await batcher.close()


async def test_a_bad_row_fails_alone() -> None:
    engine = GatedEngine()
    batcher = batcher_of(engine)
    first = await busy(engine, batcher)
    waiting = await enqueued(batcher, rows(1), rows(POISON), rows(3))
    engine.open()
    good, bad, other = (await asyncio.gather(first, *waiting, return_exceptions=True))[1:]
    assert isinstance(bad, PenstockError)
    assert [answer[0].tolist() for answer in (good, other)] == [[[2, 2]], [[6, 6]]]
    assert sizes(engine) == [1, 3, 1, 1, 1]
    await batcher.close()


class StoppingEngine(GatedEngine):
    """Fails with what no future takes."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None) -> list[Array]:
        super().run(inputs, outputs, stop)
        raise StopIteration("a secret")


@pytest.mark.parametrize("loop_rows", [0, 4])
async def test_whatever_an_engine_raises_its_caller_gets_an_answer(
    loop_rows: int, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = StoppingEngine()
    engine.open()
    batcher = batcher_of(engine, loop_rows=loop_rows)
    for value in range(2):
        with pytest.raises(PenstockError, match="version 1: unexpected StopIteration while running"):
            async with asyncio.timeout(10):
                await batcher.infer(rows(value))
    assert capsys.readouterr().out.count("a run failed unexpectedly") == 2
    await batcher.close()


async def test_closing_finishes_what_is_queued_and_takes_nothing_new() -> None:
    engine = GatedEngine()
    batcher = batcher_of(engine)
    first = await busy(engine, batcher)
    (waiting,) = await enqueued(batcher, rows(1))
    closing = asyncio.create_task(batcher.close())
    await asyncio.sleep(0)
    with pytest.raises(NotReadyError, match="being unloaded"):
        await batcher.infer(rows(2))
    assert not engine.closed
    engine.open()
    await closing
    assert (first.done(), waiting.done(), engine.closed) == (True, True, True)


async def test_what_comes_within_one_tick_runs_together_on_the_loop() -> None:
    engine = GatedEngine()
    engine.open()
    batcher = batcher_of(engine, loop_rows=4)
    answers = await asyncio.gather(*[batcher.infer(rows(value)) for value in range(6)])
    # The first one cannot know that others come; who is alone waits for nobody.
    assert sizes(engine) == [1, 4, 1]
    await asyncio.gather(*[batcher.infer(rows(value)) for value in range(4)])
    await asyncio.gather(*[batcher.infer(rows(value)) for value in range(4)])
    assert sum(sizes(engine)[3:]) == 8
    assert [answer[0].tolist() for answer in answers] == [[[2 * value] * 2] for value in range(6)]
    await batcher.close()


async def test_a_batch_that_is_too_large_for_the_loop_runs_on_a_thread() -> None:
    engine = GatedEngine()
    batcher = batcher_of(engine, loop_rows=2)
    first = asyncio.create_task(batcher.infer(rows(1, 3)))
    async with asyncio.timeout(10):
        while not engine.runs:  # noqa: ASYNC110  # the engine's thread announces nothing
            await asyncio.sleep(0.001)
    # Were it on the loop, nothing here would go on before the gate opens.
    engine.open()
    assert (await first)[0].shape == (3, 2)
    await batcher.close()


async def test_a_preferred_size_is_waited_for_no_longer_than_the_delay() -> None:
    engine = GatedEngine()
    engine.open()
    patient = batcher_of(engine, options=replace(OPTIONS, preferred_batch_sizes=(2,), max_queue_delay_us=60_000_000))
    async with asyncio.timeout(20):
        await asyncio.gather(patient.infer(rows(1)), patient.infer(rows(2)))
        (early,) = await enqueued(patient, rows(3))
        await asyncio.sleep(0.02)
        assert not early.done()
        await asyncio.gather(early, patient.infer(rows(4)))
        (alone,) = await enqueued(patient, rows(5))
        await asyncio.sleep(0.02)
        assert not alone.done()
        # Who closes does not wait for others to come.
        await patient.close()
    assert sizes(engine) == [2, 2, 1]
    hasty = batcher_of(engine, options=replace(OPTIONS, preferred_batch_sizes=(2,), max_queue_delay_us=10_000))
    await hasty.infer(rows(4))
    await hasty.close()


async def test_an_urgent_request_goes_first_and_a_level_too_many_is_the_default_one() -> None:
    engine = GatedEngine()
    options = replace(OPTIONS, max_batch_size=1, priority_levels=2, default_level=2)
    batcher = batcher_of(engine, options=options)
    first = await busy(engine, batcher)
    urgent = rows(3)
    urgent.priority = 1
    unknown = rows(4)
    unknown.priority = 3
    waiting = await enqueued(batcher, rows(1), unknown, rows(2), urgent)
    engine.open()
    await asyncio.gather(first, *waiting)
    assert [run[0, 0] for run in engine.runs] == [0, 3, 1, 4, 2]
    await batcher.close()


async def test_a_request_that_waited_too_long_is_refused_and_never_run() -> None:
    engine = GatedEngine()
    batcher = batcher_of(engine)
    first = await busy(engine, batcher)
    hasty = rows(1)
    hasty.timeout_us = 20_000
    with pytest.raises(DeadlineError, match=r"timeout of 0\.02 s passed before it was run"):
        await batcher.infer(hasty)
    engine.open()
    await first
    assert sizes(engine) == [1]
    await batcher.close()


async def test_a_policy_can_delay_what_waited_too_long_and_keep_callers_from_asking_for_less() -> None:
    engine = GatedEngine()
    policy = QueuePolicy(max_queue_size=QUEUE, timeout_us=20_000, delays=True, allow_override=False)
    batcher = batcher_of(engine, options=replace(OPTIONS, max_batch_size=1, default_policy=policy))
    first = await busy(engine, batcher)
    (late,) = await enqueued(batcher, rows(1))
    await asyncio.sleep(0.1)
    hasty = rows(2)
    hasty.timeout_us = 1
    (punctual,) = await enqueued(batcher, hasty)
    engine.open()
    await asyncio.gather(first, late, punctual)
    assert [run[0, 0] for run in engine.runs] == [0, 2, 1]
    await batcher.close()


async def test_instances_run_side_by_side_and_answer_in_order_if_they_must() -> None:
    slow, fast = GatedEngine(), GatedEngine()
    fast.open()
    batcher = batcher_of(slow, fast, options=replace(OPTIONS, max_batch_size=1, preserve_ordering=True))
    first = await busy(slow, batcher)
    others = [await enqueued(batcher, rows(value)) for value in (1, 2)]
    async with asyncio.timeout(10):
        while len(fast.runs) < 2:  # noqa: ASYNC110  # the engine's thread announces nothing
            await asyncio.sleep(0.001)
    await asyncio.sleep(0.02)
    assert not any(task.done() for tasks in others for task in tasks)
    slow.open()
    await asyncio.gather(first, *[task for tasks in others for task in tasks])
    await batcher.close()


async def test_rows_of_different_lengths_share_a_run_when_they_are_padded() -> None:
    engine = GatedEngine()
    padding = Padding("width", (4, 8), {"rows": -1.0})
    batcher = batcher_of(engine, options=replace(OPTIONS, padding=padding))
    first = await busy(engine, batcher)
    waiting = await enqueued(batcher, rows(1, width=3), rows(2, width=4), rows(3, width=5))
    engine.open()
    answers = await asyncio.gather(first, *waiting)
    assert [run.tolist() for run in engine.runs[1:]] == [
        [[1, 1, 1, -1], [2, 2, 2, 2]],
        [[3, 3, 3, 3, 3, -1, -1, -1]],
    ]
    assert [answer[0].tolist() for answer in answers[1:]] == [[[2] * 3], [[4] * 4], [[6] * 5]]
    await batcher.close()


async def test_a_run_whose_callers_have_all_left_is_stopped() -> None:
    engine = GatedEngine()
    batcher = batcher_of(engine)
    first = await busy(engine, batcher)
    waiting = await enqueued(batcher, rows(1), rows(2))
    engine.gate.release()
    await first
    async with asyncio.timeout(10):
        while len(engine.runs) < 2:  # noqa: ASYNC110  # the engine's thread announces nothing
            await asyncio.sleep(0.001)
    # The first run's callers have been answered, which is a way to leave, too.
    engine.stopped = False
    waiting[0].cancel()
    await asyncio.sleep(0.01)
    assert not engine.stopped
    waiting[1].cancel()
    async with asyncio.timeout(10):
        while not engine.stopped:  # noqa: ASYNC110  # callbacks run when the loop comes to them
            await asyncio.sleep(0.001)
    engine.open()
    await batcher.close()


async def test_statistics_count_what_happened() -> None:
    engine = GatedEngine()
    signature = Signature.of(signature_message())
    statistics = Statistics()
    batcher = Batcher("m", [Instance(engine, signature, None, 0)], signature, OPTIONS, statistics)
    first = await busy(engine, batcher)
    waiting = await enqueued(batcher, rows(1), rows(2, 2), rows(POISON))
    gone = (await enqueued(batcher, rows(3)))[0]
    gone.cancel()
    engine.open()
    await asyncio.gather(first, *waiting, gone, return_exceptions=True)
    assert (statistics.success.count, statistics.inference_count) == (3, 4)
    assert statistics.failures == {"CANCELED": 1, "BACKEND": 1}
    assert statistics.fail.count == 2
    assert statistics.queue.ns > 0
    assert statistics.success.ns >= statistics.queue.ns + statistics.run.ns
    await batcher.close()


async def test_rows_of_callers_who_left_during_the_run_are_no_inferences() -> None:
    engine = GatedEngine()
    signature, statistics = Signature.of(signature_message()), Statistics()
    batcher = Batcher("m", [Instance(engine, signature, None, 0)], signature, OPTIONS, statistics)
    first = await busy(engine, batcher)
    gone, stays = await enqueued(batcher, rows(1, 3), rows(2))
    engine.gate.release()
    async with asyncio.timeout(10):
        while len(engine.runs) < 2:  # noqa: ASYNC110  # the engine's thread announces nothing
            await asyncio.sleep(0.001)
    gone.cancel()
    engine.open()
    await asyncio.gather(first, gone, stays, return_exceptions=True)
    assert sizes(engine) == [1, 4]
    assert (statistics.inference_count, statistics.execution_count) == (2, 2)
    await batcher.close()
