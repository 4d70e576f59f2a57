"""Reads an ONNX file and has ONNX Runtime load it."""

from collections import Counter
from math import prod
from pathlib import Path

import onnxruntime

from penstock.converters import onnx_file
from penstock.converters.gate import nodes_of
from penstock.converters.inspection import Inspection, Provider
from penstock.converters.onnx_file import external_tensors, location_of
from penstock.converters.runtime import Runtime, RuntimeDeathError, RuntimeRefusalError
from penstock.converters.signature import read_signature


def inspect_here(path: Path) -> Inspection:
    """`inspect` in this process."""
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
