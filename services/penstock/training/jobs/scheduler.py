"""Gives queued jobs to workers, one process a job, and watches over their leases."""

import asyncio
import shutil
from dataclasses import dataclass
from pathlib import Path

import structlog

from penstock.api.training.v1.job_pb2 import LogLine
from penstock.api.training.v1.worker_service_pb2 import Lease
from penstock.training.jobs.lifecycle import Lifecycle
from penstock.training.jobs.patience import until_stored
from penstock.training.jobs.process import worker_process
from penstock.training.settings import TrainingSettings

_log = structlog.get_logger("penstock.scheduler")


@dataclass
class _Running:
    """An attempt in progress. `deadline` is moved by the worker's heartbeats until the job is cancelled."""

    deadline: asyncio.Timeout
    cancelled: bool = False


class Scheduler:
    """The one owner of workers. Starts at most `max_parallel_jobs`."""

    def __init__(self, lifecycle: Lifecycle, settings: TrainingSettings, folder: Path) -> None:
        self._lifecycle = lifecycle
        self._settings = settings
        self._folder = folder
        self._wake = asyncio.Event()
        self._running: dict[str, _Running] = {}
        self._attempts: set[asyncio.Task[None]] = set()
        self._loop: asyncio.Task[None] | None = None

    def start(self, address: str) -> None:
        """Begins to start workers, which are told to call `address`."""
        shutil.rmtree(self._folder, ignore_errors=True)
        self._wake.set()
        self._loop = asyncio.create_task(self._run(address))

    async def stop(self) -> None:
        """Kills the workers. Their jobs stay as they are; the next start of the service takes them up."""
        tasks = [*self._attempts, *([self._loop] if self._loop else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def wake(self) -> None:
        """Looks for queued jobs."""
        self._wake.set()

    def renew(self, job_id: str) -> None:
        """Prolongs the lease of a job whose worker has spoken."""
        running = self._running.get(job_id)
        if running and not running.cancelled and not running.deadline.expired():
            running.deadline.reschedule(asyncio.get_running_loop().time() + self._settings.lease_s)

    def cancel(self, job_id: str) -> None:
        """Gives a worker the time of grace to stop by itself."""
        running = self._running.get(job_id)
        if running and not running.cancelled and not running.deadline.expired():
            running.cancelled = True
            running.deadline.reschedule(asyncio.get_running_loop().time() + self._settings.cancel_grace_s)

    async def _run(self, address: str) -> None:
        while True:
            await self._wake.wait()
            self._wake.clear()
            while len(self._attempts) < self._settings.max_parallel_jobs:
                lease = await until_stored(self._lifecycle.next_lease)
                if lease is None:
                    break
                attempt = asyncio.create_task(self._attend(address, lease))
                self._attempts.add(attempt)
                attempt.add_done_callback(self._ended)

    def _ended(self, attempt: asyncio.Task[None]) -> None:
        self._attempts.discard(attempt)
        if not attempt.cancelled() and (error := attempt.exception()):
            _log.error("attempt not attended", exc_info=error)
        self._wake.set()

    async def _attend(self, address: str, lease: Lease) -> None:
        """Runs one worker to its end and settles the attempt if the worker did not."""
        log = _log.bind(job_id=lease.job_id, attempt=lease.fencing_token)
        log.info("worker starts")
        try:
            end = await self._work(address, lease)
        except OSError as error:
            end = f"could not be started: {error.strerror}"
        log.info("worker ended", end=end)
        await until_stored(lambda: self._lifecycle.lose_worker(lease.job_id, lease.fencing_token, f"The worker {end}."))

    async def _work(self, address: str, lease: Lease) -> str:
        async def output(lines: list[LogLine]) -> None:
            await until_stored(lambda: self._lifecycle.record_output(lease.job_id, lease.fencing_token, lines))

        folder = self._folder / f"{lease.job_id}-{lease.fencing_token}"
        interval_s = self._settings.checkpoint_interval_s
        async with worker_process(address, lease, interval_s, folder, output) as worker:
            try:
                async with asyncio.timeout(self._settings.lease_s) as deadline:
                    self._running[lease.job_id] = _Running(deadline)
                    # Cancelled between the grant of the lease and here.
                    if await self._lifecycle.cancel_requested(lease):
                        self.cancel(lease.job_id)
                    return await worker.wait()
            except TimeoutError:
                return f"was silent for {self._settings.lease_s:g} s and lost its lease"
            finally:
                del self._running[lease.job_id]
