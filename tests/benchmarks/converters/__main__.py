"""`make bench-convert`: rows a second of converted graphs beside tf2onnx's own, TensorFlow and PyTorch where it is."""

import argparse
import datetime as dt
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from tests.benchmarks.converters import measuring
from tests.benchmarks.converters.models import SUBJECTS
from tests.benchmarks.converters.ways import THREADS
from tests.benchmarks.harness import keep, processor
from tests.benchmarks.report import Aim, Results, Row

MEAN_AIM = 1.6


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.converters", description=__doc__)
    parser.add_argument("models", nargs="*", metavar="model", help=f"of {', '.join(SUBJECTS)}; default: all")
    chosen = parser.parse_args()
    if unknown := set(chosen.models) - SUBJECTS.keys():
        parser.error(f"There is no model {', '.join(sorted(unknown))}; there are {', '.join(SUBJECTS)}.")
    started = dt.datetime.now(dt.UTC)
    machine = {"time": started.isoformat(timespec="seconds"), "processor": processor(), "cores": THREADS}
    results = Results(
        "Converted graphs beside their references",
        {**machine, "quick": False, "versions": measuring.versions()},
    )
    # What TensorFlow and tf2onnx take for a large model they never give back: each model has a process of its own.
    with ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1) as pool:
        for found, missing in pool.map(measuring.measure, chosen.models or SUBJECTS):
            results.rows += found
            results.failures |= missing
    ratios = [row.ratio for row in results.rows if row.reference == measuring.TENSORFLOW and row.ratio]
    what, unit = f"geometric mean of {len(ratios)} models", f"× {measuring.TENSORFLOW}"
    mean = statistics.geometric_mean(ratios)
    results.rows.append(Row("all", what, unit, mean, aim=Aim("value", MEAN_AIM, True)))
    keep(results, started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
