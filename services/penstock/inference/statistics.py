"""Counters of one served version: plain numbers with one writer, the event loop; cumulative since it was loaded.

A request counts when it is settled, a run when it ends. Durations are nanoseconds.
"""

import time
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.inference.inference import Inference, Run

STAGE_BOUNDS_NS = tuple(int(bound * 1e9) for bound in (1e-5, 5e-5, 1e-4, 5e-4, 1e-3, 5e-3, 1e-2, 5e-2, 0.1, 0.5, 1, 5))
ROW_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(slots=True)
class Duration:
    """How often, and how long in all."""

    count: int = 0
    ns: int = 0

    def add(self, ns: int, count: int = 1) -> None:
        self.count += count
        self.ns += ns


class Histogram:
    """Counts of values in fixed buckets; the last one is for what lies above every bound."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[int]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(self.bounds) + 1)
        self.sum = 0

    def observe(self, value: int) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value


def _stage() -> Histogram:
    return Histogram(STAGE_BOUNDS_NS)


@dataclass(slots=True)
class BatchDurations:
    """The runs of one batch size."""

    gather: Duration = field(default_factory=Duration)
    run: Duration = field(default_factory=Duration)
    settle: Duration = field(default_factory=Duration)


@dataclass(slots=True)
class Statistics:
    """What has happened to one version."""

    success: Duration = field(default_factory=Duration)
    fail: Duration = field(default_factory=Duration)
    queue: Duration = field(default_factory=Duration)
    gather: Duration = field(default_factory=Duration)
    run: Duration = field(default_factory=Duration)
    settle: Duration = field(default_factory=Duration)
    cache_hit: Duration = field(default_factory=Duration)
    cache_miss: Duration = field(default_factory=Duration)
    inference_count: int = 0
    execution_count: int = 0
    last_inference_ms: int = 0
    batches: dict[int, BatchDurations] = field(default_factory=dict)
    failures: dict[str, int] = field(default_factory=dict)
    queue_histogram: Histogram = field(default_factory=_stage)
    gather_histogram: Histogram = field(default_factory=_stage)
    run_histogram: Histogram = field(default_factory=_stage)
    settle_histogram: Histogram = field(default_factory=_stage)
    rows_histogram: Histogram = field(default_factory=lambda: Histogram(ROW_BOUNDS))

    def succeeded(self, run: Run, inferences: Sequence[Inference]) -> None:
        """Counts one run that answered these requests. Of a stage that requests share, each is told the whole."""
        count = len(inferences)
        gather_ns, run_ns, settle_ns = (
            run.gathered_ns - run.start_ns,
            run.ran_ns - run.gathered_ns,
            run.settled_ns - run.ran_ns,
        )
        observe = self.queue_histogram.observe
        arrivals_ns = 0
        for inference in inferences:
            arrivals_ns += inference.arrival_ns
            # Not the run's rows: some of those may have been of callers who left.
            self.inference_count += inference.rows
            observe(run.start_ns - inference.arrival_ns)
        self.success.add(count * run.settled_ns - arrivals_ns, count)
        self.queue.add(count * run.start_ns - arrivals_ns, count)
        self.gather.add(count * gather_ns, count)
        self.run.add(count * run_ns, count)
        self.settle.add(count * settle_ns, count)
        self.execution_count += 1
        self.last_inference_ms = time.time_ns() // 1_000_000
        self.gather_histogram.observe(gather_ns)
        self.run_histogram.observe(run_ns)
        self.settle_histogram.observe(settle_ns)
        self.rows_histogram.observe(run.rows)
        batch = self.batches.get(run.rows)
        if batch is None:
            batch = self.batches[run.rows] = BatchDurations()
        batch.gather.add(gather_ns)
        batch.run.add(run_ns)
        batch.settle.add(settle_ns)

    def failed(self, inference: Inference, reason: str) -> None:
        """Counts one request that was not answered. `reason` is one of few: OTHER, REJECTED, CANCELED, BACKEND."""
        self.fail.add(time.perf_counter_ns() - inference.arrival_ns)
        self.failures[reason] = self.failures.get(reason, 0) + 1
