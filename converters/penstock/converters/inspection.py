"""What an ONNX file is, without running it."""

from collections import Counter
from dataclasses import dataclass
from math import prod
from os import PathLike
from pathlib import Path

import onnxruntime

from penstock.converters import onnx_file
from penstock.converters.gate import nodes_of
from penstock.converters.onnx_file import external_tensors, location_of
from penstock.converters.runtime import Runtime, RuntimeDeathError, RuntimeRefusalError
from penstock.converters.signature import Signature, read_signature


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


def inspect(path: str | PathLike[str]) -> Inspection:
    """Reads an ONNX file and has ONNX Runtime load it. Raises `UnsafeFileError` and `ConversionError`, as `convert`."""
    path = Path(path)
    model = onnx_file.read(path, with_data=False)
    locations = sorted({location_of(tensor) for tensor in external_tensors(model)})
    operators = Counter(f"{node.domain}.{node.op_type}".removeprefix(".") for node in nodes_of(model.graph))
    return Inspection(
        path=path,
        signature=read_signature(model),
        operators=dict(sorted(operators.items(), key=lambda item: (-item[1], item[0]))),
        parameter_count=sum(prod(constant.dims) for constant in model.graph.initializer),
        size_bytes=sum(file.stat().st_size for file in (path, *(path.parent / name for name in locations))),
        ir_version=model.ir_version,
        opsets={entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        producer=f"{model.producer_name} {model.producer_version}".strip(),
        metadata={entry.key: entry.value for entry in model.metadata_props},
        external_data=tuple(locations),
        providers=tuple(_tried(path, name) for name in onnxruntime.get_available_providers()),
    )


def _tried(path: Path, provider: str) -> Provider:
    try:
        with Runtime(path, provider=provider) as runtime:
            runtime.load()
    except (RuntimeRefusalError, RuntimeDeathError) as error:
        return Provider(provider, str(error).splitlines()[0])
    return Provider(provider, None)
