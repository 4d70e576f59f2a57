"""A Keras model on its way through TensorFlow to ONNX."""

import onnx

from penstock.converters import naming, tf2onnx_route
from penstock.converters.keras_source import KerasSource
from penstock.converters.signature import Signature


class KerasModel(KerasSource):
    """A Keras model that becomes a graph by way of tf2onnx."""

    def to_onnx(self, signature: Signature) -> onnx.ModelProto:
        traced = tf2onnx_route.trace(self)
        graph = tf2onnx_route.to_onnx(traced, self)
        return naming.finish(graph, signature, traced.inputs, traced.outputs, self.name)
