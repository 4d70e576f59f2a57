"""Rows of results, and how they are shown: a table on the terminal, JSON, and a picture."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

# On a quiet machine, windows of the same server differ by less.
STEADY = 1.25


@dataclass(frozen=True)
class Aim:
    """What a row is to reach: a bound on its value, its ratio to the reference, or its excess over the reference."""

    of: Literal["value", "ratio", "excess"]
    bound: float
    at_least: bool

    def met(self, reached: float) -> bool:
        return reached >= self.bound if self.at_least else reached <= self.bound

    def verdict(self, reached: float, unit: str) -> str:
        """Met or missed, and by how much: a share of the bound, or for an excess its unit."""
        if self.of == "excess":
            by = f"{abs(reached - self.bound):.3g} {unit}"
        else:
            by = f"{abs(reached / self.bound - 1):.0%}"
        return f"{'met' if self.met(reached) else 'MISSED'} by {by}"

    def text(self, unit: str) -> str:
        sign = "≥" if self.at_least else "≤"
        if self.of == "ratio":
            return f"{sign} {self.bound:g} ×"
        return f"{sign} {'+' if self.of == 'excess' else ''}{self.bound:g} {unit}"


@dataclass(frozen=True)
class Row:
    """A measured value beside its reference. `windows` holds everything that was measured for it."""

    section: str
    what: str
    unit: str
    value: float
    reference: str = ""
    reference_value: float | None = None
    # Of the windows of one round each, and of those the median: that is fair where the machine's speed drifts.
    ratio: float | None = None
    excess: float | None = None
    aim: Aim | None = None
    # False for the far end of a distribution: that differs from window to window on a quiet machine, too.
    steady: bool = True
    windows: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def reached(self) -> float | None:
        """What the aim is about."""
        if self.aim is None:
            return None
        return {"value": self.value, "ratio": self.ratio, "excess": self.excess}[self.aim.of]

    @property
    def spread(self) -> float:
        """The largest of equal windows over the smallest: how unsteady the machine was."""
        return max((max(windows) / min(windows) for windows in self.windows.values()), default=1.0)

    @property
    def verdict(self) -> str:
        return "" if self.aim is None or self.reached is None else self.aim.verdict(self.reached, self.unit)


@dataclass(frozen=True)
class Curve:
    """Requests a second of a server by the number of requests in flight."""

    server: str
    concurrency: Sequence[int]
    per_second: Sequence[float]


@dataclass
class Results:
    """Everything one run found."""

    title: str
    machine: dict[str, Any]
    rows: list[Row] = field(default_factory=list)
    growth: list[Curve] = field(default_factory=list)
    # Sections that could not be measured, and why.
    failures: dict[str, str] = field(default_factory=dict)
    # What a reader of the figures has to know.
    notes: list[str] = field(default_factory=list)


def number(value: float | None) -> str:
    """Three digits and more where the number is large."""
    if value is None or math.isnan(value):
        return ""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def show(results: Results, console: Console) -> None:
    table = Table(title=results.title)
    for title in ("what", "unit", "measured", "reference", "its value", "ratio", "aim", "verdict"):
        right = title in {"measured", "its value", "ratio"}
        table.add_column(title, justify="right" if right else "left", no_wrap=right)
    section = ""
    for row in results.rows:
        if row.section != section:
            section = row.section
            table.add_section()
            table.add_row(f"[bold]{section}[/]")
        met = row.aim is None or row.reached is None or row.aim.met(row.reached)
        table.add_row(
            row.what,
            row.unit,
            number(row.value),
            row.reference,
            number(row.reference_value),
            number(row.ratio),
            row.aim.text(row.unit) if row.aim else "",
            f"[{'green' if met else 'red'}]{row.verdict}[/]" if row.verdict else "",
        )
    console.print(table)
    if results.growth:
        console.print(_growth(results.growth))
    console.print(
        "Values are medians over the rounds; the ratio is the median of the rounds' ratios, so it may differ from the "
        "ratio of the medians.",
        style="dim",
    )
    for note in results.notes:
        console.print(note, style="dim", markup=False)
    unsteady = [row for row in results.rows if row.steady and row.spread > STEADY]
    if unsteady:
        worst = max(row.spread for row in unsteady)
        console.print(
            f"[yellow]The machine was not quiet:[/] in {len(unsteady)} of {len(results.rows)} rows, windows of the "
            f"same differ by more than {STEADY - 1:.0%}, at worst {worst:.1f} ×. Measure again when nothing else runs."
        )
    for name, why in results.failures.items():
        console.print(f"[red]Not measured: {name}.[/] ", end="")
        console.print(why, markup=False)


def _growth(curves: Sequence[Curve]) -> Table:
    table = Table(title="MLP: requests a second by requests in flight")
    table.add_column("in flight")
    for at in curves[0].concurrency:
        table.add_column(str(at), justify="right")
    for curve in curves:
        table.add_row(curve.server, *map(number, curve.per_second))
    return table


def write_json(results: Results, path: Path) -> None:
    content = asdict(results)
    for row, written in zip(results.rows, content["rows"], strict=True):
        written |= {"verdict": row.verdict, "spread": row.spread}
    path.write_text(json.dumps(_plain(content), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _plain(content: Any) -> Any:
    """NaN is no JSON: a value that is missing is null."""
    if isinstance(content, dict):
        return {key: _plain(value) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return [_plain(value) for value in content]
    return None if isinstance(content, float) and math.isnan(content) else content


def draw(results: Results, path: Path) -> None:
    """How far each aim is exceeded or missed, and the curves of growth where there are any."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    aims = [row for row in results.rows if row.aim is not None]
    panels = 2 if results.growth else 1
    figure, axes = plt.subplots(
        1, panels, figsize=(8.5 * panels, max(6, 0.55 * len(aims))), layout="constrained", squeeze=False
    )
    if results.growth:
        _draw_growth(axes[0, 0], results.growth)
    _draw_aims(axes[0, -1], aims)
    figure.supxlabel("\n".join(results.notes), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _draw_growth(axes: Any, curves: Sequence[Curve]) -> None:
    axes.set_title("MLP 784-128-128-10, one row a request")
    for curve in curves:
        axes.plot(curve.concurrency, curve.per_second, marker="o", label=curve.server)
    axes.set_xscale("log", base=2)
    axes.set_xticks(curves[0].concurrency)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.legend()
    axes.set(xlabel="requests in flight", ylabel="requests per second", ylim=(0, None))
    axes.yaxis.set_major_formatter("{x:,.0f}")
    axes.grid(visible=True, alpha=0.3)


def _draw_aims(axes: Any, aims: Sequence[Row]) -> None:
    axes.set_title("Aims: how many times better than the aim (right of the line is met)")
    margins = [_margin(row) for row in aims]
    colours = ["tab:green" if margin >= 1 else "tab:red" for margin in margins]
    axes.barh(range(len(aims)), [margin - 1 for margin in margins], left=1, color=colours)
    labels = [f"{row.section}: {row.what}" + (f"\nbeside {row.reference}" if row.reference else "") for row in aims]
    axes.set_yticks(range(len(aims)), labels, fontsize=8)
    for at, row in enumerate(aims):
        axes.text(1.02, at, row.verdict, va="center", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter("{x:g}")
    axes.set_xlim(min([*margins, 0.5]) / 1.2, max([*margins, 2]) * 1.2)
    axes.axvline(1, color="black", linewidth=1)
    axes.invert_yaxis()


def _margin(row: Row) -> float:
    """What was reached over what was to be reached, or the other way round where less is better: 1 just meets it."""
    if row.aim is None or row.reached is None:
        return 1.0
    if row.aim.of == "excess":
        return ((row.reference_value or 0) + row.aim.bound) / ((row.reference_value or 0) + row.reached)
    return row.reached / row.aim.bound if row.aim.at_least else row.aim.bound / row.reached
