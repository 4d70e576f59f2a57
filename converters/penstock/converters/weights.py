"""A graph apart from its weights, which may be gigabytes: a copy of a graph need not be one of them."""

import math

from google.protobuf.message import Message
from onnx import ModelProto, helper


def without_weights(model: ModelProto) -> ModelProto:
    """A copy of all but the initializers of the graph; graphs inside it keep theirs."""
    copy = ModelProto()
    _copy_fields(model, copy, "graph")
    _copy_fields(model.graph, copy.graph, "initializer")
    return copy


def size_bytes(model: ModelProto) -> int:
    """About what the graph's initializers take. To ask a message for its size is to write it, several times over."""
    return sum(
        math.prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in model.graph.initializer
    )


def _copy_fields(source: Message, target: Message, left_out: str) -> None:
    for field, value in source.ListFields():
        if field.name == left_out:
            continue
        if field.is_repeated:
            getattr(target, field.name).extend(value)
        elif field.message_type is not None:
            getattr(target, field.name).CopyFrom(value)
        else:
            setattr(target, field.name, value)
