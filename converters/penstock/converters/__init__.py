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
    from penstock.converters.conversion import Conversion, convert
    from penstock.converters.parity import ParityCase, ParityReport, Tolerance
    from penstock.converters.signature import Signature, TensorSpec, read_signature

__all__ = [
    "Conversion",
    "ConversionError",
    "GateError",
    "InvalidSamplesError",
    "ParityCase",
    "ParityReport",
    "Signature",
    "TensorSpec",
    "Tolerance",
    "UnsafeFileError",
    "UnsupportedModelError",
    "convert",
    "read_signature",
]

_HOMES = {
    "Conversion": "conversion",
    "convert": "conversion",
    "ParityCase": "parity",
    "ParityReport": "parity",
    "Tolerance": "parity",
    "Signature": "signature",
    "TensorSpec": "signature",
    "read_signature": "signature",
}


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value
