"""What an ONNX file is, without running it."""

from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from penstock.converters.foreign_files import inspect_file
from penstock.converters.limits import Limits
from penstock.converters.signature import Signature


@dataclass(frozen=True)
class Provider:
    """An execution provider of this machine's ONNX Runtime. `refusal` says why it cannot run the model, if so."""

    name: str
    refusal: str | None


@dataclass(frozen=True)
class Inspection:
    """`operators` are by how often they come, the domain before all but ONNX's own. `size_bytes` counts all files."""

    path: Path
    signature: Signature
    operators: dict[str, int]
    parameter_count: int
    size_bytes: int
    ir_version: int
    opsets: dict[str, int]
    producer: str
    metadata: dict[str, str]
    external_data: tuple[str, ...]
    providers: tuple[Provider, ...]


def inspect(path: str | PathLike[str], *, limits: Limits | None = None) -> Inspection:
    """Reads an ONNX file and has ONNX Runtime load it, in a process of its own.

    Raises `UnsafeFileError` and `ConversionError`, as `convert`.
    """
    return inspect_file(Path(path), limits=limits)
