"""The variants of a converted model, as options and as a table."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from penstock.cli.output import visible
from penstock.cli.ranges import FiniteRange

if TYPE_CHECKING:
    from rich.table import Table
    from rich.text import Text

    from penstock.converters import AccuracyBound, VariantReport
    from penstock.converters.variants import Form

variants_option = click.option(
    "--variants",
    metavar="NAME,…",
    default="",
    help="Also try the graph as fp16, int8, int8-static (needs --samples), int4 or pruned, and write those that are "
    "worth it beside TARGET: model.int8.onnx.",
)
auto_option = click.option(
    "--auto",
    is_flag=True,
    help="Make TARGET the fastest variant that is accurate enough, of --variants or of all. It stays fp32 if none is "
    "faster.",
)
agreement_option = click.option(
    "--agreement",
    type=FiniteRange(min=0, max=1),
    help="Share of rows on which a variant of a classifier must name the model's class. [default: 0.99]",
)
error_option = click.option(
    "--relative-error",
    type=FiniteRange(min=0),
    help="How far other answers of a variant may be from the model's, relative to their size. [default: 0.05]",
)


def named_forms(names: str) -> "list[Form]":
    """The names between commas; whether there is such a variant is the converter's to say."""
    return [name.strip() for name in names.split(",") if name.strip()]  # type: ignore[misc]


def bound_of(agreement: float | None, relative_error: float | None) -> "AccuracyBound":
    from penstock.converters import AccuracyBound

    default = AccuracyBound()
    return AccuracyBound(
        default.argmax_agreement if agreement is None else agreement,
        default.relative_error if relative_error is None else relative_error,
    )


def variant_lines(report: "VariantReport") -> "Iterator[Table | Text]":
    """A table with the worst of each variant's outputs, narrow enough for 80 columns, and why variants were dropped."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(
        *("variant", "max abs", "mean abs", "rel", "argmax", "1 row", f"{report.batch_size} rows", "size", ""),
        title=f"Variants, on {report.row_count} rows",
        box=box.SIMPLE,
        padding=0,
    )
    for variant in report.variants:
        cells = [""] * 7
        if found := variant.measurement:
            cells = [
                f"{max(error.max_absolute_error for error in found.errors):.1e}",
                f"{max(error.mean_absolute_error for error in found.errors):.1e}",
                f"{found.relative_error:.1e}",
                f"{found.argmax_agreement:.1%}",
                _duration(found.row_latency_us),
                _duration(found.batch_latency_us),
                _size(found.size_bytes),
            ]
        outcome = "chosen" if variant.name == report.chosen else "dropped" if variant.dropped else "kept"
        table.add_row(variant.name, *cells, outcome)
    yield table
    for variant in report.variants:
        if variant.dropped:
            yield Text(f"{variant.name} was dropped: {visible(variant.dropped)}")


def _duration(microseconds: float) -> str:
    return f"{microseconds:.0f} µs" if microseconds < 10_000 else f"{microseconds / 1000:.0f} ms"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 100_000 else f"{count / 1e3:.1f} kB"
