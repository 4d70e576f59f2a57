"""A scheduler whose answers are kept, for models whose configuration switches the response cache on."""

import uuid
from collections.abc import AsyncGenerator
from time import perf_counter_ns

from penstock.inference.inference import Inference, Scheduler
from penstock.inference.response_cache import ResponseCache, key
from penstock.inference.statistics import Statistics
from penstock.inference.tensors import Array


class CachedScheduler:
    """Asks the cache first, then `scheduler`. What is cached goes when the version does."""

    def __init__(self, scheduler: Scheduler, cache: ResponseCache, statistics: Statistics) -> None:
        self._scheduler = scheduler
        self._cache = cache
        self._statistics = statistics
        # Not the version's digest: another load of it may run on other hardware and answer slightly differently.
        self._identity = uuid.uuid4().hex

    async def infer(self, inference: Inference) -> list[Array]:
        """As the scheduler's; the arrays of an answer from the cache are read-only."""
        if inference.sequence is not None:
            # What a step of a sequence answers depends on the steps before.
            return await self._scheduler.infer(inference)
        started_ns = perf_counter_ns()
        name = key(self._identity, inference.inputs, inference.outputs, inference.parameters)
        if (kept := self._cache.get(name)) is not None:
            looked_up_ns = perf_counter_ns() - started_ns
            self._statistics.cache_hit.add(looked_up_ns)
            self._statistics.success.add(looked_up_ns)
            return list(kept)
        arrays = await self._scheduler.infer(inference)
        answered_ns = perf_counter_ns()
        self._cache.put(name, arrays)
        self._statistics.cache_miss.add(perf_counter_ns() - answered_ns)
        return arrays

    async def stream(self, inference: Inference) -> AsyncGenerator[list[Array]]:
        """The one answer."""
        yield await self.infer(inference)

    @property
    def pending(self) -> int:
        return self._scheduler.pending

    async def close(self) -> None:
        await self._scheduler.close()
        self._cache.drop(self._identity)
