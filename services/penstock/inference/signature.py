"""A version's signature, as requests are checked against it."""

from dataclasses import dataclass

from penstock.api.types.v1 import signature_pb2
from penstock.inference.tensors import DATATYPES, Datatype
from penstock.rpc.errors import InvalidFieldError, UnimplementedError

BATCH = "batch"


@dataclass(frozen=True)
class Tensor:
    """One named input or output. An axis is a size, or the name of a dynamic axis."""

    name: str
    datatype: Datatype
    shape: tuple[int | str, ...]

    @property
    def wire_shape(self) -> list[int]:
        """The shape as the protocol's metadata tells it: −1 for a dynamic axis."""
        return [axis if isinstance(axis, int) else -1 for axis in self.shape]

    def __str__(self) -> str:
        return f"{self.name}: {self.datatype.name} [{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class Signature:
    """What a version takes and gives, by name, in the model's order.

    It is `batched` if the first axis of every tensor is the dynamic axis `batch`: rows are then independent requests.
    """

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    batched: bool

    @classmethod
    def of(cls, message: signature_pb2.Signature) -> "Signature":
        """Raises `InvalidFieldError` for a signature without a meaning, `UnimplementedError` for BF16."""
        inputs = {tensor.name: tensor for tensor in map(_tensor, message.inputs)}
        outputs = {tensor.name: tensor for tensor in map(_tensor, message.outputs)}
        if not (inputs and outputs) or len(inputs) < len(message.inputs) or len(outputs) < len(message.outputs):
            raise InvalidFieldError.of(
                "version.signature",
                f"expected inputs and outputs with names of their own; got inputs "
                f"{[spec.name for spec in message.inputs]} and outputs {[spec.name for spec in message.outputs]}",
            )
        batched = all(tensor.shape[:1] == (BATCH,) for tensor in (*inputs.values(), *outputs.values()))
        return cls(inputs, outputs, batched)


def _tensor(spec: signature_pb2.TensorSpec) -> Tensor:
    datatype = DATATYPES.get(spec.datatype)
    if spec.datatype == "BF16":
        raise UnimplementedError(f"Tensor {spec.name!r} is BF16, which this server does not serve. Cast it to FP32.")
    if datatype is None:
        raise InvalidFieldError.of(
            "version.signature",
            f"tensor {spec.name!r}: expected a datatype of {', '.join(DATATYPES)}; got {spec.datatype!r}",
        )
    shape = tuple(axis.name if axis.WhichOneof("extent") == "name" else axis.size for axis in spec.shape)
    return Tensor(spec.name, datatype, shape)
