"""The asynchronous client. It speaks in the contract's own messages, and in numpy arrays for rows and tensors."""

from types import TracebackType
from typing import Self

from penstock.client.channel import Addresses, open_channel
from penstock.client.datasets import AsyncDatasets
from penstock.client.deployments import AsyncDeployments
from penstock.client.inference import AsyncInference
from penstock.client.jobs import AsyncJobs
from penstock.client.models import AsyncModels


class AsyncClient:
    """All services of one Penstock. Connections are made when they are first used.

    Use it as `async with AsyncClient() as penstock: await penstock.models.list()`.
    """

    def __init__(self, addresses: Addresses | None = None) -> None:
        where = addresses or Addresses()
        registry, training, inference = map(open_channel, (where.registry, where.training, where.inference))
        self._channels = (registry, training, inference)
        self.datasets = AsyncDatasets(training)
        self.jobs = AsyncJobs(training)
        self.models = AsyncModels(registry)
        self.deployments = AsyncDeployments(registry, inference)
        self.inference = AsyncInference(inference)

    async def close(self) -> None:
        for channel in self._channels:
            await channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
