"""h2load as the client: windows of load on a server, checked for answers that are no answers."""

import math
import re
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.benchmarks.harness import BenchError
from tests.benchmarks.inference.tools import h2load
from tests.benchmarks.inference.wire import PATH, Request


@dataclass(frozen=True)
class Window:
    """One window of load. The latencies, in seconds, are there where they were asked for."""

    per_second: float
    latencies_s: Sequence[float] = ()

    def quantile_s(self, share: float) -> float:
        """The latency that this share of the requests did not exceed: 0.5 is the median, 1 the longest."""
        return sorted(self.latencies_s)[math.ceil(share * len(self.latencies_s)) - 1]


@dataclass(frozen=True)
class Target:
    """A server to load with one request; its right answer has `answer_size` bytes, gRPC's prefix included."""

    name: str
    address: str
    asked: Request
    answer_size: int

    def load(self, concurrency: int, seconds: float, *, steady: bool = False, single: bool = False) -> Window:
        """Keeps `concurrency` requests in flight, over 8 connections at most, for a while.

        `steady` counts from the end of one batch to the end of the last one: where batches take a good part of the
        window, whether the last one still fits would be chance. `single` measures the latencies.
        """
        connections = min(concurrency, 8)
        streams = concurrency // connections
        with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
            log = Path(folder) / "log"
            # A line for each request costs the client little, but at tens of thousands a second not nothing.
            logging = (f"--log-file={log}",) if steady or single else ()
            said = self._run(f"-c{connections}", f"-m{streams}", f"-D{1000 * seconds:.0f}ms", *logging)
            done = self._check(said, concurrency)
            requests = _requests(log) if logging else []
        per_second = _steady_rate(requests, concurrency) if steady else done / seconds
        return Window(per_second, [taken for _, taken in requests])

    def _run(self, *options: str) -> str:
        client = h2load()
        command = [client.path, *options, "-t1", "-d", str(self.asked.frame)]
        command += ["-H", "content-type: application/grpc", "-H", "te: trailers", f"http://{self.address}{PATH}"]
        try:
            process = subprocess.run(
                command, env=client.environment, capture_output=True, text=True, check=False, timeout=120
            )
        except subprocess.TimeoutExpired as error:
            raise BenchError(f"h2load on {self.name} did not end within {error.timeout:.0f} s.") from error
        if process.returncode:
            raise BenchError(f"h2load failed on {self.name}: {process.stdout}{process.stderr}")
        return process.stdout

    def _check(self, said: str, concurrency: int) -> int:
        """The requests that were answered.

        A gRPC error is an HTTP 200 without a body; so the bytes must be those of as many right answers.
        """
        counts = re.search(
            r"(\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout\n"
            r"status codes: (\d+) 2xx, .*\n"
            r"traffic: .*, \S+ \((\d+)\) data",
            said,
        )
        if counts is None:
            raise BenchError(f"h2load said of {self.name} what the harness does not understand:\n{said}")
        done, succeeded, failed, errored, timeout, ok, data = map(int, counts.groups())
        if not done:
            raise BenchError(f"{self.name} answered nothing within the window.")
        # Of what was cut off at the end of the window, too, the status may have arrived.
        if failed or errored or timeout or succeeded != done or not done <= ok <= done + concurrency:
            raise BenchError(f"{self.name} failed {done - min(ok, succeeded)} of {done} requests.")
        size = self.answer_size
        # What was cut off at the end of the window may have arrived in part.
        if not done * size <= data <= (done + concurrency) * size:
            raise BenchError(f"{self.name} sent {data} bytes for {done} answers of {size}: some were errors.")
        return done


def _requests(log: Path) -> list[tuple[float, float]]:
    """When each request ended and how long it took, in seconds, in the order of their ends."""
    rows = [line.split() for line in log.read_text(encoding="ascii").splitlines()]
    return sorted(((int(start) + int(taken)) / 1e6, int(taken) / 1e6) for start, _, taken in rows)


def _steady_rate(requests: list[tuple[float, float]], concurrency: int) -> float:
    """Requests a second between the ends of two batches; requests that end together were one batch."""
    ends = [end for end, _ in requests]
    if len(ends) < 2 * concurrency:
        raise BenchError(f"{len(ends)} answers are too few for a rate at {concurrency} at once: lengthen the window.")
    # Somewhere after the first full round of answers a batch ends: there the next answer is furthest away.
    first = max(range(concurrency // 2, concurrency + concurrency // 2), key=lambda at: ends[at + 1] - ends[at])
    return (len(ends) - 1 - first) / (ends[-1] - ends[first])
