"""The three services as a user runs them, and the command beside them."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from penstock.client import Addresses

PENSTOCK = Path(sys.executable).parent / "penstock"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@dataclass
class Up:
    """One `penstock up`, on ports and a home of its own."""

    home: Path
    ports: tuple[int, int, int] = field(default_factory=lambda: (free_port(), free_port(), free_port()))
    process: "subprocess.Popen[str] | None" = None

    @property
    def addresses(self) -> Addresses:
        return Addresses(*(f"127.0.0.1:{port}" for port in self.ports))

    @property
    def environment(self) -> dict[str, str]:
        addresses = self.addresses
        return {
            **os.environ,
            "PENSTOCK_REGISTRY_ADDRESS": addresses.registry,
            "PENSTOCK_TRAINING_ADDRESS": addresses.training,
            "PENSTOCK_INFERENCE_ADDRESS": addresses.inference,
            "COLUMNS": "200",
        }

    def start(self) -> None:
        options = [
            f"--{name}-port={port}"
            for name, port in zip(("registry", "training", "inference"), self.ports, strict=True)
        ]
        self.process = subprocess.Popen(
            [PENSTOCK, "up", "--home", self.home, "--log-level", "warning", "--metrics-port", "0", *options],
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert self.process.stderr is not None
        seen = []
        for line in self.process.stderr:
            seen.append(line)
            if line.startswith("Penstock is up"):
                return
        self.process.communicate(timeout=60)
        raise AssertionError("".join(seen))

    def stop(self) -> int:
        """Ctrl-C, as a terminal sends it: to every process of the group."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGINT)
        self.process.communicate(timeout=60)
        return self.process.returncode

    def run(self, *arguments: str | Path, check: bool = True) -> "subprocess.CompletedProcess[str]":
        """Runs the command against these services."""
        result = subprocess.run(
            [PENSTOCK, *arguments], capture_output=True, text=True, check=False, env=self.environment, timeout=120
        )
        assert result.returncode == 0 or not check, result.stderr
        return result

    def json(self, *arguments: str | Path) -> Any:
        return json.loads(self.run(*arguments, "--json").stdout)


def wait_for(condition: Any, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to pass"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Up]:
    services = Up(tmp_path_factory.mktemp("home"))
    services.start()
    yield services
    if services.process is not None and services.process.poll() is None:
        services.stop()
