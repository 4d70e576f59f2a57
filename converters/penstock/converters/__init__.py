"""From a trained model to an ONNX graph that was proved to give the same answers.

Importing this package imports none of TensorFlow, Keras, ONNX or NumPy: what needs them is loaded at its first use.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from penstock.converters.errors import (
    ConversionError,
    GateError,
    InvalidSamplesError,
    UnsafeFileError,
    UnsupportedModelError,
)

if TYPE_CHECKING:
    from penstock.converters.conversion import Conversion, convert, verify
    from penstock.converters.fusion import optimize
    from penstock.converters.inspection import Inspection, Provider, inspect
    from penstock.converters.limits import Limits
    from penstock.converters.parity import DatatypeTolerance, ParityCase, ParityReport, SkippedRows, Tolerance
    from penstock.converters.quantization import quantize
    from penstock.converters.signature import Signature, TensorSpec, read_signature
    from penstock.converters.variants import AccuracyBound, Variant, VariantError, VariantMeasurement, VariantReport

__all__ = [
    "AccuracyBound",
    "Conversion",
    "ConversionError",
    "DatatypeTolerance",
    "GateError",
    "Inspection",
    "InvalidSamplesError",
    "Limits",
    "ParityCase",
    "ParityReport",
    "Provider",
    "Signature",
    "SkippedRows",
    "TensorSpec",
    "Tolerance",
    "UnsafeFileError",
    "UnsupportedModelError",
    "Variant",
    "VariantError",
    "VariantMeasurement",
    "VariantReport",
    "convert",
    "inspect",
    "optimize",
    "quantize",
    "read_signature",
    "verify",
]

_HOMES = {
    "Conversion": "conversion",
    "convert": "conversion",
    "verify": "conversion",
    "Inspection": "inspection",
    "Provider": "inspection",
    "inspect": "inspection",
    "optimize": "fusion",
    "Limits": "limits",
    "DatatypeTolerance": "parity",
    "ParityCase": "parity",
    "ParityReport": "parity",
    "SkippedRows": "parity",
    "Tolerance": "parity",
    "quantize": "quantization",
    "Signature": "signature",
    "TensorSpec": "signature",
    "read_signature": "signature",
    "AccuracyBound": "variants",
    "Variant": "variants",
    "VariantError": "variants",
    "VariantMeasurement": "variants",
    "VariantReport": "variants",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
