"""`make bench`: measures, prints the table, and keeps it as JSON and as a picture."""

import argparse
import datetime as dt
import os
import signal
import sys

from tests.benchmarks.harness import CACHE, BenchError, keep, processor, progress, step
from tests.benchmarks.inference.scenarios import SECTIONS, Pace
from tests.benchmarks.inference.tools import h2load, mlserver, versions
from tests.benchmarks.report import Results

CORES = 2
QUICK = Pace(rounds=1, small_s=1.0, large_s=2.0)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.inference", description=__doc__)
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="one short round: whether it works, not how fast it is")
    parser.add_argument("--cores", type=int, default=CORES, help="CPUs for servers and client together; default: 2")
    chosen = parser.parse_args()
    if unknown := set(chosen.sections) - SECTIONS.keys():
        parser.error(f"There is no section {', '.join(sorted(unknown))}; there are {', '.join(SECTIONS)}.")
    return chosen


def main() -> int:
    chosen = arguments()
    # So that the servers end with the harness whatever ends it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    # Every process that the harness starts inherits this.
    cores = sorted(os.sched_getaffinity(0))[: chosen.cores]
    os.sched_setaffinity(0, cores)
    CACHE.mkdir(parents=True, exist_ok=True)
    started = dt.datetime.now(dt.UTC)
    with progress():
        h2load()
        mlserver()
        results = Results(
            "Penstock inference beside its references",
            {
                "time": started.isoformat(timespec="seconds"),
                "processor": processor(),
                "cores": len(cores),
                "quick": chosen.quick,
                "versions": versions(),
            },
        )
        for name in chosen.sections or SECTIONS:
            try:
                SECTIONS[name](results, QUICK if chosen.quick else Pace())
            except BenchError as error:
                # What the other sections find is worth its minutes all the same.
                results.failures[name] = str(error)
                step(f"{name} cannot be measured: {error}")
    keep(results, started)
    return 1 if results.failures else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchError as error:
        sys.exit(f"Nothing can be measured: {error}")
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
