"""`make bench-command`: how long the command takes to answer, beside an interpreter that does nothing.

Prints medians of whole processes, taken in turn so that a machine whose speed drifts is fair to each.
"""

import statistics
import subprocess
import sys
import time
from pathlib import Path

ROUNDS = 15
PENSTOCK = str(Path(sys.executable).parent / "penstock")
COMMANDS = {
    "python -c pass": [sys.executable, "-c", "pass"],
    "penstock --help": [PENSTOCK, "--help"],
    "penstock jobs create mlp --help": [PENSTOCK, "jobs", "create", "mlp", "--help"],
    "penstock serve inference --help": [PENSTOCK, "serve", "inference", "--help"],
}


def seconds(command: list[str]) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - started


def main() -> None:
    taken: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, command in COMMANDS.items():
            taken[name].append(seconds(command))
    for name, times in taken.items():
        print(f"{name:<34} median {statistics.median(times):.3f} s, from {min(times):.3f} to {max(times):.3f}")


if __name__ == "__main__":
    main()
