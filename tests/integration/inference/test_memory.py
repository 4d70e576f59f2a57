"""What a model took is given back when it goes, and what a failed load took as well."""

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from pathlib import Path

import numpy as np
import pytest
from onnx import helper
from tests.integration.inference import graphs
from tests.integration.inference.fleet import Inference, folder_server, put_model

from penstock.inference.inference import Loaded
from penstock.inference.memory import give_back
from penstock.inference.served_version import ServedVersion, State
from penstock.inference.wanted import WantedVersion
from penstock.oip import inference_pb2 as pb
from penstock.rpc.errors import WrongStateError

_MODEL_MIB = 20
_ROUNDS = 50
# Half of what the rounds would take if only every fifth were kept.
_BOUND_MIB = _ROUNDS * _MODEL_MIB / 10


def heavy(shape: tuple[int, int]) -> graphs.Bundle:
    """`rows` [batch, 4] times weights of 20 MiB, summed up. It loads only with weights of 4 rows."""
    return graphs.bundle_of(
        [
            helper.make_node("MatMul", ["rows", "weights"], ["wide"]),
            helper.make_node("ReduceSum", ["wide", "axes"], ["scaled"], keepdims=1),
        ],
        [graphs.value("rows", "FP32", ["batch", graphs.FEATURES])],
        [graphs.value("scaled", "FP32", ["batch", 1])],
        {
            "weights": np.ones(shape, np.float32),
            "axes": np.array([1], np.int64),
        },
    )


def resident_mib() -> float:
    """What the process holds, with what is free given back."""
    gc.collect()
    give_back()
    lines = Path("/proc/self/status").read_text().splitlines()
    (size,) = [line.split()[1] for line in lines if line.startswith("VmRSS:")]
    return int(size) / 1024


async def load(server: Inference) -> None:
    await server.oip.RepositoryModelLoad(pb.RepositoryModelLoadRequest(model_name="heavy"), timeout=20)


async def unload(server: Inference) -> None:
    await server.oip.RepositoryModelUnload(pb.RepositoryModelUnloadRequest(model_name="heavy"), timeout=20)


async def served(server: Inference) -> None:
    """A whole life: loaded, asked, loaded once more, unloaded."""
    await load(server)
    await server.infer("heavy", np.ones((2, graphs.FEATURES), np.float32))
    await load(server)
    await unload(server)


async def torn(server: Inference) -> None:
    """A load that fails late, with the weights in memory."""
    with pytest.raises(Exception, match="failed to load"):
        await load(server)


COLUMNS = _MODEL_MIB * 2**20 // 4 // graphs.FEATURES


@pytest.mark.parametrize(("life", "shape"), [(served, (graphs.FEATURES, COLUMNS)), (torn, (COLUMNS, graphs.FEATURES))])
async def test_memory_is_given_back(
    tmp_path: Path, life: Callable[[Inference], Awaitable[None]], shape: tuple[int, int]
) -> None:
    put_model(tmp_path / "models", "heavy", heavy(shape))
    # In this process, whose memory can be told from what it may still give back.
    async with folder_server(
        tmp_path / "models", tmp_path / "home", "grpcio", mode="explicit", intra_op_threads=1
    ) as server:
        for _ in range(5):
            await life(server)
        before = await asyncio.to_thread(resident_mib)
        for _ in range(_ROUNDS):
            await life(server)
        assert await asyncio.to_thread(resident_mib) - before < _BOUND_MIB


class HalfOpened:
    """What a load had in its hands when it failed."""


class Torn:
    """A source whose load fails in the way that loads do: one error from another, with the model in their frames."""

    keeps = ()

    def __init__(self) -> None:
        self.opened: weakref.ref[HalfOpened] | None = None

    async def load(self) -> Loaded:
        model = HalfOpened()
        self.opened = weakref.ref(model)
        try:
            int(repr(model))
        except ValueError as error:
            raise WrongStateError("It is torn.") from error
        raise AssertionError


async def test_a_version_that_failed_holds_nothing_of_what_it_had_opened() -> None:
    source = Torn()
    failed = asyncio.Event()
    version = ServedVersion(WantedVersion("torn", 1, "", 0, source), lambda _: failed.set(), retries=False)
    await failed.wait()
    gc.collect()
    assert (version.state, version.message) == (State.FAILED, "It is torn.")
    assert source.opened is not None
    assert source.opened() is None
    await version.close()
