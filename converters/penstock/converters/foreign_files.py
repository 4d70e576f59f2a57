"""What is done with the file of a stranger, each in a process of its own (`sandbox`)."""

import tempfile
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from numpy.typing import NDArray

from penstock.converters.codec import decode
from penstock.converters.limits import Limits
from penstock.converters.parity import ParityReport
from penstock.converters.sandbox import ask
from penstock.converters.writing import place, write

if TYPE_CHECKING:
    from collections.abc import Iterator

    from penstock.converters.conversion import Conversion
    from penstock.converters.inspection import Inspection


def convert_file(
    source: Path,
    target: Path,
    *,
    samples: Mapping[str, NDArray[Any]] | None,
    on_step: Callable[[Any], None] | None,
    limits: Limits | None,
    **options: Any,  # noqa: ANN401 those of `convert_here`, which knows their types
) -> "Conversion":
    """`convert_here` elsewhere. The file that it wrote is put in its place here."""
    from penstock.converters.conversion import Conversion  # noqa: PLC0415 it needs this module, too

    with _folder() as folder:
        result = folder / "result"
        result.mkdir()
        arguments = {"model": source.absolute(), "path": result / target.name, **options}
        answer = ask("convert", source, arguments, folder, samples=samples, on_step=on_step, limits=limits)
        made: Conversion = decode(Conversion, answer)
        data = result / made.data.name if made.data else None
        for file in made.variant_files.values():
            place(target.with_name(file.name), result / file.name, None)
        place(target, result / target.name, data)
    return replace(
        made,
        path=target,
        data=target.with_name(data.name) if data else None,
        variant_files={name: target.with_name(file.name) for name, file in made.variant_files.items()},
    )


def verify_file(
    model: Any,  # noqa: ANN401 an ONNX model, which publishes no types, or a path
    source: Path,
    *,
    samples: Mapping[str, NDArray[Any]] | None,
    limits: Limits | None,
    **options: Any,  # noqa: ANN401 those of `verify_here`, which knows their types
) -> ParityReport:
    """`verify_here` elsewhere."""
    with _folder() as folder:
        if isinstance(model, str | PathLike):
            path = Path(model).absolute()
        else:
            path = folder / "model.onnx"
            write(path, model)
        arguments = {"model": path, "source": source.absolute(), **options}
        report: ParityReport = decode(
            ParityReport, ask("verify", source, arguments, folder, samples=samples, limits=limits)
        )
        return report


def inspect_file(path: Path, *, limits: Limits | None) -> "Inspection":
    """`inspect_here` elsewhere."""
    from penstock.converters.inspection import Inspection  # noqa: PLC0415 it needs this module, too

    with _folder() as folder:
        found: Inspection = decode(Inspection, ask("inspect", path, {"path": path.absolute()}, folder, limits=limits))
    return replace(found, path=path)


@contextmanager
def _folder() -> "Iterator[Path]":
    with tempfile.TemporaryDirectory(prefix="penstock-sandbox-") as folder:
        yield Path(folder)
