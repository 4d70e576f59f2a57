"""Requests that differ in nothing but their raw contents, read and answered by a plan made for the first of them.

Clients send the same request again and again with other numbers in it. All that was found out about it, and most of
the answer, then holds for the next one: what is before its raw contents is compared as bytes, in one step. Requests for
small models spend most of their time in being read.
"""

from math import prod

import numpy as np

from penstock.inference.inference import Inference
from penstock.inference.served_version import ServedVersion
from penstock.inference.tensors import BOOL, BYTES, Array
from penstock.inference.wire import RAW_INPUT_TAG, InferRequest, raw_output_parts, varint
from penstock.oip import inference_pb2 as pb

_MAX_LENGTHS = 256
_MAX_PLANS_OF_LENGTH = 8


class Plan:
    """How to read and answer requests that begin with `prefix`, up to the bytes of their one input."""

    def __init__(
        self, prefix: bytes, request: pb.ModelInferRequest, version: ServedVersion, inference: Inference
    ) -> None:
        ((self._input, array),) = inference.inputs.items()
        self.prefix = prefix
        self.model = request.model_name
        self.number = request.model_version
        self.version = version
        self._outputs = inference.outputs
        self._rows = inference.rows
        self._shape = array.shape
        self._dtype = array.dtype
        self._count = prod(array.shape)
        self._header = b""
        self._header_shapes: list[tuple[int, ...]] = []

    def read(self, data: bytes) -> Inference:
        """The inference of a request that begins with the plan's prefix and is as long as the plan's own."""
        array = np.frombuffer(data, self._dtype, self._count, len(self.prefix)).reshape(self._shape)
        return Inference({self._input: array}, self._outputs, self._rows)

    def write(self, arrays: list[Array]) -> bytes:
        """The answer with these outputs."""
        shapes = [array.shape for array in arrays]
        if shapes != self._header_shapes:
            self._header, self._header_shapes = self._made_header(arrays), shapes
        return b"".join((self._header, *raw_output_parts([array.tobytes() for array in arrays])))

    def _made_header(self, arrays: list[Array]) -> bytes:
        response = pb.ModelInferResponse(model_name=self.model, model_version=str(self.version.number))
        outputs = self.version.signature.outputs
        for name, array in zip(self._outputs, arrays, strict=True):
            response.outputs.add(name=name, datatype=outputs[name].datatype.name, shape=array.shape)
        return response.SerializeToString()


class PlannedRequest:
    """A request that a plan can read and answer."""

    __slots__ = ("data", "plan")

    def __init__(self, plan: Plan, data: bytes) -> None:
        self.plan = plan
        self.data = data


class Plans:
    """The plans in use, by the length of their requests. Bounded."""

    def __init__(self) -> None:
        self._by_length: dict[int, list[Plan]] = {}

    def find(self, data: bytes) -> Plan | None:
        """The plan for a request's bytes. It may be for a version that no longer answers."""
        for plan in self._by_length.get(len(data), ()):
            if data.startswith(plan.prefix):
                return plan
        return None

    def learn(self, data: bytes, request: InferRequest, version: ServedVersion, inference: Inference) -> None:
        """Makes a plan of a request that was read the long way, if a plan can say all of it."""
        if not _plain(request, version, inference):
            return
        ending = RAW_INPUT_TAG + varint(len(request.raw[0]))
        prefix = data[: len(data) - len(request.raw[0])]
        # Fields may come in any order; only where the raw contents come last is the rest in front of them.
        if not prefix.endswith(ending) or not _same(prefix[: -len(ending)], request.message):
            return
        plans = self._by_length.setdefault(len(data), [])
        plans[:] = [plan for plan in plans if plan.prefix != prefix][-_MAX_PLANS_OF_LENGTH + 1 :]
        plans.append(Plan(prefix, request.message, version, inference))
        if len(self._by_length) > _MAX_LENGTHS:
            del self._by_length[next(iter(self._by_length))]


def _plain(request: InferRequest, version: ServedVersion, inference: Inference) -> bool:
    message = request.message
    signature = version.signature
    return (
        len(request.raw) == len(message.inputs) == 1
        and not message.id
        and not message.parameters
        and not message.inputs[0].parameters
        and not any(output.parameters for output in message.outputs)
        and signature.inputs[message.inputs[0].name].datatype not in (BOOL, BYTES)
        and not any(signature.outputs[name].datatype is BYTES for name in inference.outputs)
    )


def _same(data: bytes, message: pb.ModelInferRequest) -> bool:
    """Whether bytes are a message but for its raw contents."""
    rest = pb.ModelInferRequest()
    rest.CopyFrom(message)
    rest.ClearField("raw_input_contents")
    return pb.ModelInferRequest.FromString(data) == rest
