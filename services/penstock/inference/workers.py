"""Several workers that behave as one server.

A client's call reaches one of them. What it changes is changed on all, in one order everywhere: worker 0 leads. The
others pass such calls on to it; it changes itself and then all others at once, and answers when all have. What a call
counts is counted on all. Every other call, inference above all, is answered by the worker that it reached.
"""

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from google.protobuf.message import Message

from penstock.api.types.v1.error_reason_pb2 import ErrorReason
from penstock.inference.messages import merged_statistics
from penstock.inference.metrics import SNAPSHOT_TIMEOUT_S, Collector, awaited_on_loop
from penstock.inference.oip_servicer import InferenceServicer
from penstock.inference.peers import METRICS, Peer, UnreachableError
from penstock.inference.settings import InferenceSettings
from penstock.inference.worker_metrics import ServerCollector, WorkerCollector, packed
from penstock.oip import inference_pb2 as pb
from penstock.oip import inference_pb2_grpc as rpc
from penstock.rpc.application import Service
from penstock.rpc.errors import PenstockError
from penstock.rpc.grpcio_transport import worker_server
from penstock.rpc.methods import Method, collect

if TYPE_CHECKING:
    import grpc

    Context = grpc.aio.ServicerContext[Any, Any]

_STATISTICS = "ModelStatistics"
_SETTINGS = frozenset({"TraceSetting", "LogSettings"})

# What changes something, and what it is in order with: an unload that waits for a slow model holds up no log settings.
_ORDERS = {
    "RepositoryModelLoad": "models",
    "RepositoryModelUnload": "models",
    "SystemSharedMemoryRegister": "memory",
    "SystemSharedMemoryUnregister": "memory",
    "CudaSharedMemoryRegister": "memory",
    "CudaSharedMemoryUnregister": "memory",
    "TraceSetting": "traces",
    "LogSettings": "logs",
}

# A name that is registered is refused: to make a repetition safe, what failed on one worker is taken back from all.
_TAKEN_BACK = {
    "SystemSharedMemoryRegister": ("SystemSharedMemoryUnregister", pb.SystemSharedMemoryUnregisterRequest),
    "CudaSharedMemoryRegister": ("CudaSharedMemoryUnregister", pb.CudaSharedMemoryUnregisterRequest),
}

# With these a worker says that it serves no such version: workers that follow a source do it each at its own time.
_NOT_SERVED = frozenset(
    {
        ErrorReason.ERROR_REASON_RESOURCE_NOT_FOUND,
        ErrorReason.ERROR_REASON_NOT_READY,
        ErrorReason.ERROR_REASON_WRONG_STATE,
    }
)


class _Shared(ABC):
    """A servicer that is the worker's own but for the calls that concern all workers."""

    def __init__(self, own: InferenceServicer) -> None:
        self._own = own
        for name in (*_ORDERS, _STATISTICS):
            setattr(self, name, partial(self._answer, name))

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401  # whatever the own servicer has
        return getattr(self._own, name)

    def service(self) -> Service:
        servicer = cast("rpc.GRPCInferenceServiceServicer", self)
        return replace(
            self._own.service(), add=lambda server: rpc.add_GRPCInferenceServiceServicer_to_server(servicer, server)
        )

    async def _answer(self, name: str, request: Any, context: "Context") -> Message:  # noqa: ANN401  # any message
        if name in _SETTINGS and not request.settings:
            # It only asks, and all workers have the same.
            return await self._here(name, request, context)
        return await self._for_all(name, request, context)

    async def _here(self, name: str, request: Message, context: "Context") -> Message:
        answer: Message = await getattr(self._own, name)(request, context)
        return answer

    @abstractmethod
    async def _for_all(self, name: str, request: Message, context: "Context") -> Message:
        """Answers a call that concerns all workers."""


class Follower(_Shared):
    """A worker that passes on to worker 0 what concerns all."""

    def __init__(self, own: InferenceServicer, leader: Peer) -> None:
        super().__init__(own)
        self._leader = leader

    async def _for_all(self, name: str, request: Message, context: "Context") -> Message:
        return await self._leader.call(name, request, context.time_remaining())


class Leader(_Shared):
    """Worker 0. `limit_s` bounds what each other worker may take for a change, whatever the caller's deadline."""

    def __init__(self, own: InferenceServicer, others: Sequence[Peer], limit_s: float) -> None:
        super().__init__(own)
        self._others = others
        self._limit_s = limit_s
        self._orders = {order: asyncio.Lock() for order in _ORDERS.values()}
        self._begun: set[asyncio.Task[Message]] = set()

    async def metrics(self) -> list[bytes]:
        """The other workers' metrics; raises if one does not answer in time."""
        return await asyncio.gather(*(peer.metrics(SNAPSHOT_TIMEOUT_S) for peer in self._others))

    async def close(self) -> None:
        """Gives up what has begun and is not done."""
        for work in self._begun:
            work.cancel()
        await asyncio.gather(*self._begun, return_exceptions=True)

    async def _for_all(self, name: str, request: Message, context: "Context") -> Message:
        if name == _STATISTICS:
            return await self._statistics(request, context)
        order = self._orders[_ORDERS[name]]
        # Whoever leaves while he waits has changed nothing. What has begun goes on without him: it is to come to the
        # same end on all workers.
        await order.acquire()
        work = asyncio.create_task(self._change(order, name, request, context))
        self._begun.add(work)
        work.add_done_callback(self._ended)
        return await asyncio.shield(work)

    async def _change(self, order: asyncio.Lock, name: str, request: Message, context: "Context") -> Message:
        try:
            answer = await self._here(name, request, context)
            failures = await self._follow(name, request)
            if failures:
                if name in _TAKEN_BACK:
                    undo, message = _TAKEN_BACK[name]
                    taken_back = message(name=cast("pb.SystemSharedMemoryRegisterRequest", request).name)
                    await self._here(undo, taken_back, context)
                    await self._follow(undo, taken_back)
                raise failures[0]
            return answer
        finally:
            order.release()

    async def _follow(self, name: str, request: Message) -> list[PenstockError]:
        """Makes the change on all other workers; how it failed on some."""
        outcomes = await asyncio.gather(*(self._follow_one(peer, name, request) for peer in self._others))
        return [failure for failure in outcomes if failure is not None]

    async def _follow_one(self, peer: Peer, name: str, request: Message) -> PenstockError | None:
        try:
            await peer.call(name, request, self._limit_s)
        except PenstockError as error:
            if name == "RepositoryModelUnload" and error.reason == ErrorReason.ERROR_REASON_RESOURCE_NOT_FOUND:
                # A load that failed there: now they agree.
                return None
            error.message = (
                f"Worker {peer.number} of this server failed where others did not; to repeat the call is safe, and "
                f"makes them agree: {error.message}"
            )
            return error
        return None

    async def _statistics(self, request: Message, context: "Context") -> Message:
        outcomes = await asyncio.gather(
            self._here(_STATISTICS, request, context),
            *(peer.call(_STATISTICS, request, context.time_remaining()) for peer in self._others),
            return_exceptions=True,
        )
        answers = [one for one in outcomes if isinstance(one, pb.ModelStatisticsResponse)]
        for error in outcomes:
            if isinstance(error, BaseException) and not (answers and _serves_none(error)):
                raise error
        return merged_statistics(answers)

    def _ended(self, work: asyncio.Task[Message]) -> None:
        self._begun.discard(work)
        if not work.cancelled():
            # Where the caller has left, nobody else asks for it.
            work.exception()


def _serves_none(error: BaseException) -> bool:
    return isinstance(error, PenstockError) and error.reason in _NOT_SERVED and not isinstance(error, UnreachableError)


@asynccontextmanager
async def joined(
    settings: InferenceSettings, number: int, own: InferenceServicer, collector: Collector
) -> AsyncIterator[tuple[Service, Collector]]:
    """Makes this worker part of the server: what it answers clients with, and what tells the server's metrics.

    The latter is of use to worker 0 alone. Raises `StartupError` if its socket cannot be had.
    """
    metrics: Collector = WorkerCollector(collector, number)
    methods = {METRICS: _metrics_method(metrics, settings.max_message_bytes)}
    async with AsyncExitStack() as stack:
        if number == 0:
            others = [_peer(settings, other, stack) for other in range(1, settings.workers)]
            leader = Leader(own, others, settings.unary_timeout_s)
            stack.push_async_callback(leader.close)
            service = leader.service()
            others_metrics = awaited_on_loop(asyncio.get_running_loop(), leader.metrics)
            metrics = ServerCollector(metrics, others_metrics)
            methods |= collect([service], settings.max_message_bytes)
        else:
            service = Follower(own, _peer(settings, 0, stack)).service()
            methods |= collect([own.service()], settings.max_message_bytes)
        await stack.enter_async_context(worker_server(settings, number, methods))
        yield service, metrics


def _peer(settings: InferenceSettings, number: int, stack: AsyncExitStack) -> Peer:
    peer = Peer(settings, number)
    stack.push_async_callback(peer.close)
    return peer


def _metrics_method(collector: Collector, max_message_bytes: int) -> Method:
    async def tell(request: bytes, context: object) -> bytes:
        # On a thread, as for any reader of metrics: the event loop has better to do.
        return await asyncio.to_thread(lambda: packed(collector.collect()))

    return Method(
        METRICS,
        tell,
        request_streaming=False,
        response_streaming=False,
        decode=bytes,
        serialize=bytes,
        quiet=True,
        probe=False,
        max_message_bytes=max_message_bytes,
    )
