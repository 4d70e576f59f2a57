"""A version's signature, as requests are checked against it."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from penstock.api.types.v1 import signature_pb2
from penstock.inference.tensors import DATATYPES, Datatype
from penstock.rpc.errors import InvalidFieldError

BATCH = "batch"

Axis = int | str


@dataclass(frozen=True)
class Tensor:
    """One named input or output. An axis is a size, or the name of a dynamic axis.

    `reshape` is the shape without the batch axis that the graph has in place of this one. Axes with one name have one
    size in all inputs, but for those that are `free`.
    """

    name: str
    datatype: Datatype
    shape: tuple[Axis, ...]
    optional: bool = False
    reshape: tuple[int, ...] | None = None
    free: frozenset[str] = frozenset()

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
        """Raises `InvalidFieldError` for a signature without a meaning."""
        return cls.made(map(_tensor, message.inputs), map(_tensor, message.outputs))

    @classmethod
    def made(cls, inputs: Iterable[Tensor], outputs: Iterable[Tensor]) -> "Signature":
        """A signature of these tensors. Raises `InvalidFieldError` where a name is missing or stands twice."""
        taken, given = list(inputs), list(outputs)
        by_name = {tensor.name: tensor for tensor in taken}, {tensor.name: tensor for tensor in given}
        if not given or len(by_name[0]) < len(taken) or len(by_name[1]) < len(given):
            raise InvalidFieldError.of(
                "version.signature",
                f"expected outputs, and names of their own for all tensors; got inputs "
                f"{[tensor.name for tensor in taken]} and outputs {[tensor.name for tensor in given]}",
            )
        batched = all(tensor.shape[:1] == (BATCH,) for tensor in (*taken, *given))
        return cls(*by_name, batched)

    @cached_property
    def uniform(self) -> bool:
        """Whether rows of all requests have one shape, so that any two requests fit into one batch."""
        return not any(tensor.optional or _dynamic(tensor.shape[1:]) for tensor in self.inputs.values())


def _dynamic(shape: Sequence[Axis]) -> bool:
    return any(isinstance(axis, str) for axis in shape)


def _tensor(spec: signature_pb2.TensorSpec) -> Tensor:
    datatype = DATATYPES.get(spec.datatype)
    if datatype is None:
        raise InvalidFieldError.of(
            "version.signature",
            f"tensor {spec.name!r}: expected a datatype of {', '.join(DATATYPES)}; got {spec.datatype!r}",
        )
    shape = tuple(axis.name if axis.WhichOneof("extent") == "name" else axis.size for axis in spec.shape)
    return Tensor(spec.name, datatype, shape)
