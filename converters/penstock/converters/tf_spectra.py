"""Spectra: complex numbers of TensorFlow are pairs in a last axis here, as ONNX's `DFT` takes and gives them."""

import numpy as np
from onnx import TensorProto

from penstock.converters.tf_operators import Nodes, Replacement, translates


@translates("RFFT", "FFT", "IFFT")
def _spectrum(new: Replacement, node: Nodes) -> None:
    signal = new.inputs[0]
    if node.type == "RFFT":
        last, scalar = new.constant([-1], np.int64), new.constant([], np.int64)
        length = new("Reshape", new("Cast", new.inputs[1], to=TensorProto.INT64), scalar)
        spectrum = new("DFT", new("Unsqueeze", signal, last), length, axis=-2, onesided=1)
    else:
        spectrum = new("DFT", signal, axis=-2, inverse=int(node.type == "IFFT"))
    _pairs(new, node, spectrum)


@translates("Complex")
def _complex(new: Replacement, node: Nodes) -> None:
    last = new.constant([-1], np.int64)
    _pairs(new, node, new("Concat", *(new("Unsqueeze", part, last) for part in new.inputs), axis=-1))


@translates("Real", "Imag")
def _part(new: Replacement, node: Nodes) -> None:
    part = new.constant(0 if node.type == "Real" else 1, np.int64)
    new.becomes(new("Gather", new.inputs[0], part, axis=-1))


@translates("ComplexAbs")
def _magnitude(new: Replacement, _: Nodes) -> None:
    new.becomes(new("ReduceL2", new.inputs[0], new.constant([-1], np.int64), keepdims=0))


def _pairs(new: Replacement, node: Nodes, pairs: str) -> None:
    graph, shape = node.graph, node.graph.get_shape(node.output[0])
    new.becomes(pairs)
    graph.set_dtype(pairs, TensorProto.FLOAT)
    if shape is not None:
        graph.set_shape(pairs, [*shape, 2])
