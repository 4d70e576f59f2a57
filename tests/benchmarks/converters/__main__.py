"""`make bench-convert`: rows a second of converted graphs beside tf2onnx's own, TensorFlow and PyTorch where it is."""

import argparse
import datetime as dt
import statistics
import sys
from importlib.metadata import version

from tests.benchmarks.converters import measuring
from tests.benchmarks.converters.models import SUBJECTS
from tests.benchmarks.converters.ways import THREADS
from tests.benchmarks.harness import keep, processor, progress
from tests.benchmarks.report import Aim, Results, Row

MEAN_AIM = 1.6
PACKAGES = ("keras", "onnx", "onnxruntime", "tensorflow-cpu", "tf2onnx")


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
        {**machine, "quick": False, "versions": {name: version(name) for name in PACKAGES}},
    )
    with progress():
        for name in chosen.models or SUBJECTS:
            found, missing = measuring.measure(name)
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
