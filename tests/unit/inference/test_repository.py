"""Which versions are held and which of them answers, for every way a load can end."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest
from tests.unit.inference.gated import GatedLoader

from penstock.inference.inference import Inference
from penstock.inference.metrics import LoadMetrics
from penstock.inference.repository import Repository, UnknownModelError
from penstock.inference.served_version import State
from penstock.inference.wanted import Desired
from penstock.rpc.errors import InvalidFieldError, NotReadyError

ONE_ROW = Inference({"rows": np.ones((1, 2), np.float32)}, ("scaled",), 1)


@asynccontextmanager
async def repository() -> AsyncIterator[tuple[Repository, GatedLoader]]:
    loader = GatedLoader()
    made = Repository(loader.prune, LoadMetrics(), retries=True)
    yield made, loader
    for engine in loader.engines.values():
        engine.open()
    await made.close()


async def until(made: Repository, number: int, state: State | None) -> None:
    """Waits until a version has a state, or is gone."""
    async with asyncio.timeout(10):
        while {one.number: one.state for one in made.versions()}.get(number) is not state:  # noqa: ASYNC110  # it announces nothing
            await asyncio.sleep(0.001)


def routed(made: Repository) -> dict[int, int]:
    """The weight of every version that answers requests without a number."""
    return {one.number: made.weight(one) for one in made.versions() if made.weight(one)}


async def test_nothing_is_known_before_the_first_desired_state() -> None:
    async with repository() as (made, _):
        assert (made.settled, made.revision) == (False, 0)
        with pytest.raises(UnknownModelError, match=r"^Request for unknown model: 'gated' is not found"):
            made.route("gated", "")
        made.apply(Desired(4))
        assert (made.settled, made.revision) == (True, 4)


async def test_a_loading_model_is_not_ready_and_then_answers() -> None:
    async with repository() as (made, loader):
        made.apply(loader.desired(1, (1, 100)))
        assert not made.settled
        with pytest.raises(NotReadyError, match="'gated' version 1 is loading"):
            made.route("gated", "")
        with pytest.raises(NotReadyError, match="'gated' version 1 is loading"):
            _ = made.route("gated", "1").signature
        loader.succeed(1)
        await until(made, 1, State.READY)
        assert made.settled
        loader.engines[1].open()
        assert (await made.route("gated", "").infer(ONE_ROW))[0].tolist() == [[2, 2]]


async def test_the_route_switches_once_all_wanted_versions_are_ready() -> None:
    async with repository() as (made, loader):
        made.apply(loader.desired(1, (1, 100)))
        loader.succeed(1)
        await until(made, 1, State.READY)
        made.apply(loader.desired(2, (2, 40), (3, 60)))
        loader.succeed(2)
        await until(made, 2, State.READY)
        assert routed(made) == {1: 100}
        loader.succeed(3)
        await until(made, 1, None)
        assert routed(made) == {2: 40, 3: 60}
        assert loader.engines[1].closed


async def test_a_failed_version_keeps_the_old_one_and_is_tried_again() -> None:
    async with repository() as (made, loader):
        made.apply(loader.desired(1, (1, 100)))
        loader.succeed(1)
        await until(made, 1, State.READY)
        made.apply(loader.desired(2, (2, 100)))
        await asyncio.sleep(0)
        loader.fail(2, "Broken.")
        await until(made, 2, State.FAILED)
        assert made.settled
        assert routed(made) == {1: 100}
        with pytest.raises(NotReadyError, match="version 2 failed to load and is tried again: Broken"):
            _ = made.route("gated", "2").signature
        loader.succeed(2)
        await until(made, 1, None)
        assert routed(made) == {2: 100}


async def test_a_failed_version_takes_nothing_from_those_beside_it() -> None:
    """After a start there is no old route: the ready versions share the traffic of those that failed."""
    async with repository() as (made, loader):
        made.apply(loader.desired(1, (1, 75), (2, 25)))
        await asyncio.sleep(0)
        loader.fail(2, "Broken.")
        loader.succeed(1)
        await until(made, 1, State.READY)
        await until(made, 2, State.FAILED)
        assert routed(made) == {1: 100}
        assert made.settled
        loader.succeed(2)
        await until(made, 2, State.READY)
        assert routed(made) == {1: 75, 2: 25}


async def test_a_version_that_is_no_longer_wanted_while_it_loads_is_given_up() -> None:
    async with repository() as (made, loader):
        made.apply(loader.desired(1, (1, 100)))
        made.apply(loader.desired(2, (2, 100)))
        await until(made, 1, None)
        loader.succeed(2)
        await until(made, 2, State.READY)
        assert routed(made) == {2: 100}


async def test_a_dropped_version_finishes_its_requests_first() -> None:
    async with repository() as (made, loader):
        made.apply(loader.desired(1, (1, 100)))
        loader.succeed(1)
        await until(made, 1, State.READY)
        asked = asyncio.create_task(made.route("gated", "").infer(ONE_ROW))
        await asyncio.sleep(0)
        made.apply(Desired(2))
        await until(made, 1, State.DRAINING)
        with pytest.raises(UnknownModelError):
            made.route("gated", "")
        with pytest.raises(NotReadyError, match="being unloaded"):
            _ = made.route("gated", "1").signature
        loader.engines[1].open()
        assert (await asked)[0].tolist() == [[2, 2]]
        await until(made, 1, None)
        assert loader.engines[1].closed


async def test_a_version_says_why_it_failed_for_as_long_as_it_is_failed() -> None:
    async with repository() as (made, loader):
        made.apply(loader.desired(1, (1, 100), (2, 0)))
        await asyncio.sleep(0)
        loader.fail(1, "Broken.")
        await until(made, 1, State.FAILED)
        (first, second) = made.versions()
        assert (first.message, second.message) == ("Broken.", "")
        made.apply(Desired(2))
        await until(made, 1, None)
        assert (first.state, first.message) == (State.DRAINING, "")


async def test_a_version_that_drains_can_be_wanted_again() -> None:
    async with repository() as (made, loader):
        made.apply(loader.desired(1, (1, 100)))
        loader.succeed(1)
        await until(made, 1, State.READY)
        asked = asyncio.create_task(made.route("gated", "").infer(ONE_ROW))
        await asyncio.sleep(0)
        made.apply(Desired(2))
        made.apply(loader.desired(3, (1, 100)))
        async with asyncio.timeout(10):
            while not routed(made):  # noqa: ASYNC110  # the repository announces nothing
                await asyncio.sleep(0.001)
        assert sorted(one.state.name for one in made.versions()) == ["DRAINING", "READY"]
        assert made.route("gated", "1").state is State.READY
        loader.engines[1].open()
        await asked


async def test_the_same_desired_state_again_changes_nothing() -> None:
    async with repository() as (made, loader):
        made.apply(loader.desired(1, (1, 100)))
        loader.succeed(1)
        await until(made, 1, State.READY)
        (held,) = made.versions()
        made.apply(loader.desired(1, (1, 100)))
        assert made.versions() == [held]
        assert held.state is State.READY


async def test_draining_refuses_what_is_new() -> None:
    async with repository() as (made, loader):
        made.apply(loader.desired(1, (1, 100)))
        loader.succeed(1)
        await until(made, 1, State.READY)
        made.drain()
        assert not made.settled
        for number in ("", "1"):
            with pytest.raises(NotReadyError, match="shutting down"):
                made.route("gated", number)


@pytest.mark.parametrize("number", ["latest", "0", "-1", "01", "1.0", "٣", "9" * 19])
async def test_a_version_that_is_no_number_is_refused(number: str) -> None:
    async with repository() as (made, _):
        with pytest.raises(InvalidFieldError, match="model_version"):
            made.route("gated", number)
