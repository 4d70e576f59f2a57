"""Batches: who runs with whom, who never runs, and who gets which answer."""

import asyncio

import numpy as np
import pytest
from tests.unit.inference.gated import POISON, GatedEngine, signature_message

from penstock.inference.batcher import Batcher, BatchLimits, Inference
from penstock.inference.signature import Signature
from penstock.inference.tensors import Array
from penstock.rpc.errors import NotReadyError, PenstockError

LIMITS = BatchLimits(max_batch_size=4, max_queue_size=6)


def rows(value: float, count: int = 1, width: int = 2, outputs: tuple[str, ...] = ("scaled",)) -> Inference:
    return Inference({"rows": np.full((count, width), value, np.float32)}, outputs, count)


def batcher_of(engine: GatedEngine, batch: str = "batch") -> Batcher:
    return Batcher("Model 'm' version 1", engine, Signature.of(signature_message(batch)), LIMITS)


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
    batcher = batcher_of(engine, batch="rows")
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
    waiting = await enqueued(batcher, *[rows(value) for value in range(LIMITS.max_queue_size)])
    with pytest.raises(NotReadyError, match="'m' version 1 has 6 requests waiting, as many as max_queue_size allows"):
        await batcher.infer(rows(9))
    waiting[0].cancel()
    await asyncio.sleep(0)
    (late,) = await enqueued(batcher, rows(9))
    engine.open()
    await asyncio.gather(first, late, *waiting[1:])
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
