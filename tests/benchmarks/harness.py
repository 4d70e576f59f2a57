"""What every benchmark does: it tells its steps, measures in turn, and keeps what it found."""

import contextlib
import datetime as dt
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.status import Status
from tests.benchmarks import report
from tests.benchmarks.report import Aim, Results, Row

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".cache" / "bench"

Measured = TypeVar("Measured")
Taken = Mapping[str, Sequence[float]]

_console = Console(stderr=True)
_started = time.monotonic()
_status: Status | None = None


class BenchError(Exception):
    """A measurement that cannot be had, and why."""


@contextlib.contextmanager
def progress() -> Iterator[None]:
    """Shows the present step: in place on a terminal, a line each elsewhere."""
    global _status  # noqa: PLW0603  # one process, one terminal
    if not _console.is_terminal:
        yield
        return
    with _console.status("") as _status:
        yield
    _status = None


def step(text: str) -> None:
    elapsed = f"{time.monotonic() - _started:4.0f} s"
    if _status is not None:
        _status.update(f"{elapsed}  {text}")
    else:
        print(f"{elapsed}  {text}", file=sys.stderr, flush=True)


def in_turn(measures: Mapping[str, Callable[[], Measured]], rounds: int, what: str) -> dict[str, list[Measured]]:
    """Windows of all, one after the other and every second round backwards: a steady drift then cancels out."""
    taken: dict[str, list[Measured]] = {name: [] for name in measures}
    for number in range(rounds):
        for name in list(measures)[:: -1 if number % 2 else 1]:
            step(f"{what}: {name}, round {number + 1} of {rounds}")
            taken[name].append(measures[name]())
    return taken


def compare(
    section: str, what: str, unit: str, taken: Taken, measured: str, reference: str, aim: Aim | None = None
) -> Row:
    """A row from the windows of two that were measured in turn."""
    pairs = list(zip(taken[measured], taken[reference], strict=True))
    return Row(
        section,
        what,
        unit,
        statistics.median(taken[measured]),
        reference,
        statistics.median(taken[reference]),
        ratio=statistics.median(value / base for value, base in pairs),
        excess=statistics.median(value - base for value, base in pairs),
        aim=aim,
        windows={name: taken[name] for name in (measured, reference)},
    )


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def keep(results: Results, started: dt.datetime) -> None:
    """Shows what was found, and keeps it as JSON and as a picture."""
    folder = CACHE / "results"
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / f"{started:%Y%m%dT%H%M%SZ}"
    report.write_json(results, base.with_suffix(".json"))
    report.draw(results, base.with_suffix(".png"))
    wide = Console() if sys.stdout.isatty() else Console(width=200)
    report.show(results, wide)
    quick = ", a quick run: no figures to quote" if results.machine["quick"] else ""
    wide.print(f"{results.machine['processor']}, {results.machine['cores']} cores{quick}")
    wide.print(f"Kept in {base.relative_to(ROOT)}.json and .png")
