"""What a model takes and gives. Mirrors `penstock.api.types.v1.Signature` field for field."""

from dataclasses import dataclass
from os import PathLike
from typing import Any

from penstock.converters.errors import UnsupportedModelError

BATCH = "batch"
"""The name of the rows' axis."""

# The numbers are those of onnx.TensorProto.DataType.
_DATATYPES = {
    1: "FP32",
    2: "UINT8",
    3: "INT8",
    4: "UINT16",
    5: "INT16",
    6: "INT32",
    7: "INT64",
    8: "BYTES",
    9: "BOOL",
    10: "FP16",
    11: "FP64",
    12: "UINT32",
    13: "UINT64",
    16: "BF16",
}


@dataclass(frozen=True)
class TensorSpec:
    """One named tensor. `datatype` is an Open Inference Protocol one; an axis is a size, or a dynamic one's name."""

    name: str
    datatype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.datatype} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs in the order of the model."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


def read_signature(model: Any) -> Signature:  # noqa: ANN401 ONNX publishes no types
    """The signature of an `onnx.ModelProto`, or of the ONNX file at a path (weights in other files are not read).

    Graph inputs that have a default (an initializer of the same name) are no inputs of the model. An axis without
    size and name is called `<tensor>_axis_<index>`. Raises `UnsupportedModelError` if the file is not ONNX, or an input
    or output is no tensor of a known datatype and rank.
    """
    if isinstance(model, str | PathLike):
        model = _loaded(model)
    defaults = {initializer.name for initializer in model.graph.initializer}
    return Signature(
        inputs=tuple(_tensor_spec(value) for value in model.graph.input if value.name not in defaults),
        outputs=tuple(_tensor_spec(value) for value in model.graph.output),
    )


def onnx_type(datatype: str) -> int:
    """The `onnx.TensorProto.DataType` of a datatype of the Open Inference Protocol."""
    return next(number for number, name in _DATATYPES.items() if name == datatype)


def _loaded(path: str | PathLike[str]) -> Any:  # noqa: ANN401 ONNX publishes no types
    import onnx  # noqa: PLC0415 the dataclasses above serve without it
    from google.protobuf.message import DecodeError  # noqa: PLC0415 comes with onnx

    try:
        return onnx.load(path, format="protobuf", load_external_data=False)
    except DecodeError as error:
        raise UnsupportedModelError(f"{path} is not an ONNX file: it is no protobuf message of a model.") from error


def _tensor_spec(value: Any) -> TensorSpec:  # noqa: ANN401 ONNX publishes no types
    tensor = value.type.tensor_type
    datatype = _DATATYPES.get(tensor.elem_type)
    if datatype is None or not tensor.HasField("shape"):
        raise UnsupportedModelError(
            f"{value.name!r} must be a tensor of a known datatype and rank; its ONNX type is "
            f"{str(value.type).strip()!r}. "
            "Export the model with typed inputs and outputs."
        )
    shape = (
        dim.dim_value
        if dim.HasField("dim_value") and dim.dim_value >= 0
        else dim.dim_param or f"{value.name}_axis_{axis}"
        for axis, dim in enumerate(tensor.shape.dim)
    )
    return TensorSpec(value.name, datatype, tuple(shape))
