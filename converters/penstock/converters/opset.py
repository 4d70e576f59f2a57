"""Another version of the operators than the one that a graph was made in."""

import onnx
from onnx import version_converter

from penstock.converters.errors import UnsupportedModelError


def with_opset(model: onnx.ModelProto, opset: int | None) -> onnx.ModelProto:
    """The model in this version of ONNX's own operators, or as it is without one. Raises `UnsupportedModelError`."""
    if opset in {None, opset_of(model)}:
        return model
    try:
        converted: onnx.ModelProto = version_converter.convert_version(model, opset)
    except Exception as error:  # the converter raises RuntimeError and its relatives, by the operator at fault
        raise UnsupportedModelError(
            f"The graph, of opset {opset_of(model)}, cannot be brought to opset {opset}: {error}. Leave the opset to "
            "the converter, or choose one nearer to it."
        ) from error
    del converted.metadata_props[:]
    converted.metadata_props.extend(model.metadata_props)
    converted.producer_name, converted.producer_version = model.producer_name, model.producer_version
    return converted


def opset_of(model: onnx.ModelProto) -> int:
    """The version of ONNX's own operators; 0 if the model uses none."""
    return next((int(entry.version) for entry in model.opset_import if entry.domain in {"", "ai.onnx"}), 0)
