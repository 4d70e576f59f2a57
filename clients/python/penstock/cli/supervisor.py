"""The three services as child processes, as `penstock up` and `penstock demo` run them."""

import asyncio
import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from penstock.client import Addresses

START_TIMEOUT_S = 60.0
STOP_TIMEOUT_S = 40.0


class ServiceDiedError(Exception):
    """A service ended, or never came up. The text says which one, and where its log is if that is a file."""


@dataclass
class Child:
    """One running service."""

    name: str
    process: asyncio.subprocess.Process
    address: str


class Supervisor:
    """Starts services and stops them together. If this process dies, however it dies, they stop by themselves."""

    def __init__(self, logs: Path | None) -> None:
        """With `logs`, each service writes its log to `<name>.log` in that folder; without, to standard error."""
        self._logs = logs
        self._children: list[Child] = []

    async def start(self, name: str, *options: str) -> str:
        """Starts a service and returns its address once it takes calls. Raises `ServiceDiedError` if it does not."""
        with tempfile.TemporaryDirectory(prefix="penstock-") as folder, self._log_file(name) as log:
            ready = Path(folder) / "ready"
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "penstock.cli", "serve", name, "--stop-on-eof", "--ready-file", str(ready), *options),
                stdin=asyncio.subprocess.PIPE,
                stderr=log,
            )
            child = Child(name, process, "")
            self._children.append(child)
            child.address = await self._address(child, ready)
            return child.address

    async def wait(self) -> None:
        """Returns never; raises `ServiceDiedError` as soon as one of the services ends."""
        waits = {asyncio.create_task(child.process.wait()): child for child in self._children}
        done, _ = await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        raise self._died(waits[done.pop()])

    async def stop(self) -> None:
        """Asks every service to drain and stop, newest first, and waits; one that does not is killed."""
        for child in reversed(self._children):
            if child.process.returncode is not None:
                continue
            if child.process.stdin:
                child.process.stdin.close()
            try:
                await asyncio.wait_for(child.process.wait(), STOP_TIMEOUT_S)
            except TimeoutError:
                child.process.kill()
                await child.process.wait()

    async def _address(self, child: Child, ready: Path) -> str:
        exited = asyncio.create_task(child.process.wait())
        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                while not ready.exists():
                    if exited.done():
                        raise self._died(child)
                    await asyncio.sleep(0.03)
        except TimeoutError:
            raise ServiceDiedError(f"The {child.name} service did not start within {START_TIMEOUT_S:.0f} s.") from None
        finally:
            exited.cancel()
        return ready.read_text(encoding="utf-8")

    def _died(self, child: Child) -> ServiceDiedError:
        where = ""
        if self._logs is not None:
            last = (self._logs / f"{child.name}.log").read_text(encoding="utf-8", errors="replace").splitlines()[-5:]
            where = "\n  ".join([" Its last words:", *last])
        return ServiceDiedError(f"The {child.name} service ended with exit code {child.process.returncode}.{where}")

    @contextlib.contextmanager
    def _log_file(self, name: str) -> Iterator[IO[bytes] | None]:
        if self._logs is None:
            yield None
            return
        with (self._logs / f"{name}.log").open("ab") as log:
            yield log


@asynccontextmanager
async def running_services(
    home: Path | None,
    logs: Path | None,
    ports: Addresses | None = None,
    log_level: str = "info",
    metrics_port: int = 0,
) -> AsyncIterator[tuple[Supervisor, Addresses]]:
    """Registry, training and inference, talking to each other; they stop when the block ends.

    Without `ports` each takes a free port of the loopback interface. Raises `ServiceDiedError` if one does not start.
    """
    supervisor = Supervisor(logs)
    common = ["--log-level", log_level, *(["--home", str(home)] if home else [])]

    def listen(service: str) -> list[str]:
        address = getattr(ports, service) if ports else ":0"
        return ["--port", address.rpartition(":")[2]]

    metrics = ["--metrics-port", str(metrics_port)]
    try:
        registry = await supervisor.start("registry", *common, *listen("registry"))
        link = ["--registry", registry]
        training, inference = await asyncio.gather(
            supervisor.start("training", *common, *link, *listen("training")),
            supervisor.start("inference", *common, *link, *listen("inference"), *metrics),
        )
        yield supervisor, Addresses(registry, training, inference)
    finally:
        await supervisor.stop()
