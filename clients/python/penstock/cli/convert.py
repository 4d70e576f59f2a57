"""`penstock convert`: a trained model to ONNX."""

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from penstock.converters import Conversion

_STEPS = {
    "load": "Loading the model",
    "trace": "Asking the model",
    "convert": "Converting",
    "verify": "Comparing with the model",
    "write": "Writing",
}


@click.command()
@click.argument("source", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.argument("target", type=click.Path(dir_okay=False, path_type=Path))
@click.option(
    "--atol",
    type=click.FloatRange(min=0),
    help="Absolute difference from the model that an answer may have. [default: 1e-5]",
)
@click.option(
    "--rtol",
    type=click.FloatRange(min=0),
    help="Relative difference from the model that an answer may have. [default: 1e-4]",
)
@click.option(
    "--samples",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A .npz file with rows to compare on besides random ones: one array for each input, under its name.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the signature and the parity report as JSON.")
def convert(
    *, source: Path, target: Path, atol: float | None, rtol: float | None, samples: Path | None, as_json: bool
) -> None:
    """Convert the Keras model SOURCE (.keras) to the ONNX file TARGET.

    TARGET is written only if ONNX Runtime gives the same answers as Keras.
    """
    from penstock.converters import ConversionError, Tolerance
    from penstock.converters import convert as convert_model

    given = {name: value for name, value in (("absolute", atol), ("relative", rtol)) if value is not None}
    try:
        rows = _read_samples(samples) if samples else None
        with _progress() as on_step:
            conversion = convert_model(source, target, samples=rows, tolerance=Tolerance(**given), on_step=on_step)
    except ConversionError as error:
        raise click.ClickException(str(error)) from error
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(conversion), default=str))
    else:
        _print_tables(conversion)


def _read_samples(path: Path) -> Mapping[str, "NDArray[Any]"]:
    import zipfile

    import numpy as np

    from penstock.converters import InvalidSamplesError

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except (OSError, ValueError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidSamplesError(
            f"Cannot read the samples {path}: {error}. Write them with numpy.savez: numbers only, an array for each "
            "input."
        ) from error


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
    console.print(
        Text(
            f"{conversion.path}: {conversion.size_bytes:,} bytes, opset {conversion.opset}, sha256 {conversion.sha256}"
        )
    )
