"""`penstock convert`: a trained model to ONNX."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from penstock.cli.output import visible
from penstock.cli.ranges import FiniteRange
from penstock.cli.samples import read_samples
from penstock.cli.variants import (
    agreement_option,
    auto_option,
    bound_of,
    error_option,
    named_forms,
    variant_lines,
    variants_option,
)

if TYPE_CHECKING:
    from penstock.converters import Conversion, Limits, Tolerance

_STEPS = {
    "load": "Loading the model",
    "trace": "Asking the model",
    "convert": "Converting",
    "verify": "Comparing with the model",
    "variants": "Measuring variants",
    "write": "Writing",
}


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path), required=False)
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The file to write, another way of saying TARGET. [default: SOURCE with .onnx]",
)
@click.option(
    "--opset",
    type=click.IntRange(min=1),
    help="The version of ONNX's operators. [default: the one that the converter makes, which ONNX Runtime loads]",
)
@click.option(
    "--tolerance",
    type=FiniteRange(min=0),
    help="Difference from the model that an answer may have, absolute and relative. [default: by datatype]",
)
@click.option(
    "--atol",
    type=FiniteRange(min=0),
    help="Absolute difference from the model that an answer may have. [default: --tolerance]",
)
@click.option(
    "--rtol",
    type=FiniteRange(min=0),
    help="Relative difference from the model that an answer may have. [default: --tolerance]",
)
@click.option(
    "--samples",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A .npz or .parquet file with rows to compare on besides made ones: an array or column for each input.",
)
@variants_option
@auto_option
@agreement_option
@error_option
@click.option(
    "--report",
    "report_file",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write the parity report to this file, as JSON.",
)
@click.option(
    "--max-memory",
    "max_memory_gib",
    type=FiniteRange(min=0, min_open=True),
    help="GiB of memory that reading SOURCE may take. [default: half of the machine's]",
)
@click.option(
    "--max-seconds",
    type=FiniteRange(min=0, min_open=True),
    help="How long reading and converting SOURCE may take. [default: 1800]",
)
@click.option("--json", "as_json", is_flag=True, help="Print the signature and the parity report as JSON.")
def convert(
    *,
    source: Path,
    target: Path | None,
    output: Path | None,
    opset: int | None,
    tolerance: float | None,
    atol: float | None,
    rtol: float | None,
    samples: Path | None,
    variants: str,
    auto: bool,
    agreement: float | None,
    relative_error: float | None,
    report_file: Path | None,
    max_memory_gib: float | None,
    max_seconds: float | None,
    as_json: bool,
) -> None:
    """Convert the model SOURCE (.keras or .onnx) to the ONNX file TARGET.

    TARGET is written only if ONNX Runtime gives the same answers as the model. An .onnx is checked and cleaned.
    SOURCE may be a stranger's: it is read in a process with limits and without a network.
    """
    from penstock.converters import ConversionError
    from penstock.converters import convert as convert_model

    chosen = _target(source, target, output)
    if report_file:
        _check_report(report_file, [source, chosen, samples])
    try:
        with _progress() as on_step:
            conversion = convert_model(
                source,
                chosen,
                samples=read_samples(samples) if samples else None,
                tolerance=_tolerance(tolerance, atol, rtol),
                opset=opset,
                variants=named_forms(variants),
                auto=auto,
                bound=bound_of(agreement, relative_error),
                on_step=on_step,
                limits=_limits(max_memory_gib, max_seconds),
            )
    except ConversionError as error:
        raise click.ClickException(visible(str(error))) from error
    if report_file:
        report_file.write_text(json.dumps(dataclasses.asdict(conversion.parity), indent=2) + "\n", encoding="utf-8")
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(conversion), default=str))
    else:
        _print_tables(conversion)


def _target(source: Path, target: Path | None, output: Path | None) -> Path:
    if target and output:
        raise click.UsageError(f"Give one file to write: TARGET is {target}, --output is {output}.")
    chosen = target or output or source.with_suffix(".onnx")
    if chosen.resolve() == source.resolve():
        raise click.UsageError(f"{chosen} would replace the model itself. Name another file with -o.")
    return chosen


def _check_report(report: Path, others: Iterable[Path | None]) -> None:
    """Before the minutes of a conversion, and before the report replaces what it is about."""
    if not report.parent.is_dir():
        raise click.UsageError(f"Cannot write {report}: its folder {report.parent} does not exist. Create it first.")
    if report.resolve() in {other.resolve() for other in others if other}:
        raise click.UsageError(f"The report would replace {report}. Name another file with --report.")


def _tolerance(both: float | None, absolute: float | None, relative: float | None) -> "Tolerance | None":
    from penstock.converters import Tolerance

    if both is absolute is relative is None:
        return None
    default = Tolerance() if both is None else Tolerance(both, both)
    return Tolerance(
        default.absolute if absolute is None else absolute, default.relative if relative is None else relative
    )


def _limits(max_memory_gib: float | None, max_seconds: float | None) -> "Limits":
    import os
    from dataclasses import replace

    from penstock.converters import Limits

    limits = Limits()
    if max_memory_gib is not None:
        limits = replace(limits, memory_bytes=int(max_memory_gib * 2**30))
    if max_seconds is not None:
        # Whoever gives the time means the clock on the wall; that of the processors must not stop before it.
        limits = replace(limits, wall_seconds=max_seconds, cpu_seconds=int(max_seconds * (os.cpu_count() or 1)) + 1)
    return limits


@contextmanager
def _progress() -> Iterator[Callable[[str], None]]:
    from rich.console import Console

    console = Console(stderr=True)
    with console.status("Starting") as status:  # draws nothing unless it is a terminal
        yield lambda step: status.update(f"{_STEPS[step]} …")


def _print_tables(conversion: "Conversion") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    signature = Table("", "name", "datatype", "shape", title="Signature")
    for kind, specs in (("input", conversion.signature.inputs), ("output", conversion.signature.outputs)):
        for spec in specs:
            shape = f"[{', '.join(map(str, spec.shape))}]"
            signature.add_row(kind, Text(spec.name), spec.datatype, Text(shape))
    report = conversion.parity
    parity = Table(
        "output", "rows", "batch", "max abs", "max rel", "argmax", title=f"Parity: {report.source} and {report.runtime}"
    )
    for case in report.cases:
        parity.add_row(
            Text(case.output),
            case.rows,
            str(case.batch_size),
            f"{case.max_absolute_error:.2e}",
            f"{case.max_relative_error:.2e}",
            f"{case.argmax_agreement:.2%}",
        )
    console = Console()
    console.print(signature, parity)
    if report.variants:
        console.print(*variant_lines(report.variants), sep="\n")
    for left_out in report.skipped:
        console.print(Text(f"not compared on {left_out.rows} rows: {visible(left_out.reason)}"))
    for warning in report.warnings:
        console.print(Text(f"ONNX Runtime warns: {visible(warning)}"))
    allowed = ", ".join(
        f"{item.datatype} {item.absolute:g} + {item.relative:g} × |answer|" for item in report.tolerances
    )
    console.print(
        Text(
            f"{report.row_count} rows, {report.argmax_agreement:.2%} with the same largest element; allowed: {allowed}"
        )
    )
    console.print(
        Text(
            f"{conversion.path}: {conversion.size_bytes:,} bytes, opset {conversion.opset}, sha256 {conversion.sha256}"
        )
    )
    for path in conversion.variant_files.values():
        console.print(Text(f"{path}: {path.stat().st_size:,} bytes"))
