"""Wakes who watches a job when something happened to it."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class Bell:
    """One event for each watcher. Set once for all when the server drains."""

    def __init__(self) -> None:
        self._watchers: dict[str, set[asyncio.Event]] = {}
        self.draining = False

    @contextmanager
    def listening(self, job_id: str) -> Iterator[asyncio.Event]:
        """An event that is set with each change of the job; the watcher clears it before it looks."""
        event = asyncio.Event()
        watchers = self._watchers.setdefault(job_id, set())
        watchers.add(event)
        try:
            yield event
        finally:
            watchers.discard(event)
            if not watchers:
                self._watchers.pop(job_id, None)

    def ring(self, job_id: str) -> None:
        for event in self._watchers.get(job_id, ()):
            event.set()

    def drain(self) -> None:
        """Wakes all watchers for the last time."""
        self.draining = True
        for job_id in self._watchers:
            self.ring(job_id)
