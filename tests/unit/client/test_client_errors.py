"""What the client makes of the ways in which a call can fail."""

import asyncio

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from penstock.client import PenstockError
from penstock.client.artifacts import TRANSIENT
from penstock.client.errors import answer


def failed(code: grpc.StatusCode, details: str) -> AioRpcError:
    return AioRpcError(code, Metadata(), Metadata(), details=details)


async def raising(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [failed(grpc.StatusCode.INTERNAL, "Internal error from Core"), asyncio.CancelledError()],
    ids=["internal", "cancelled"],
)
async def test_an_answer_that_grpc_lost_is_worth_another_try(error: BaseException) -> None:
    with pytest.raises(PenstockError) as caught:
        await answer(raising(error))
    assert caught.value.code in TRANSIENT


async def test_a_server_that_says_internal_is_believed() -> None:
    with pytest.raises(PenstockError) as caught:
        await answer(raising(failed(grpc.StatusCode.INTERNAL, "Internal error in request 1.")))
    assert caught.value.code is grpc.StatusCode.INTERNAL


async def test_a_cancelled_caller_stays_cancelled() -> None:
    task = asyncio.create_task(answer(asyncio.Event().wait()))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
