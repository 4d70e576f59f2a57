"""From a ModelInferRequest to an inference that agrees with a version's signature, or to a refusal that says why."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from penstock.inference.inference import Inference
from penstock.inference.parameters import RequestParameters
from penstock.inference.shared_memory import BYTE_SIZE, OFFSET, REGION
from penstock.inference.signature import BATCH, Signature, Tensor
from penstock.inference.tensors import Array, Buffer, TensorError, decode_raw, decode_typed
from penstock.inference.wire import InferRequest
from penstock.oip import inference_pb2 as pb
from penstock.rpc.errors import InvalidFieldError

# Reads a region of shared memory: its name, an offset and a number of bytes.
RegionReader = Callable[[str, int, int], Buffer]


@dataclass(frozen=True, slots=True)
class RequestReader:
    """Reads requests to one version. `title` names it in errors; `max_batch_size` bounds the rows of a request."""

    title: str
    signature: Signature
    max_batch_size: int
    read_region: RegionReader
    # Whether elements of BYTES need not be UTF-8: text is all that a graph takes.
    any_bytes: bool = False

    def read(self, request: InferRequest) -> Inference:
        """The request's inference; its inputs are views of the request's bytes where those came raw.

        Raises `InvalidFieldError` that names the tensor, what was expected and what came.
        """
        message = request.message
        sources = self._sources(message.inputs, request.raw)
        inputs: dict[str, Array] = {}
        for index, tensor in enumerate(message.inputs):
            name = tensor.name
            if name in inputs:
                raise self._wrong(f"inputs[{index}].name", f"input {name!r} came twice")
            inputs[name] = self._input(index, tensor, sources[index])
        signature = self.signature
        if len(inputs) < len(signature.inputs):
            self._check_complete(inputs)
        if not signature.uniform or len(inputs) > 1:
            self._check_axes(message.inputs)
        outputs = self._outputs(message.outputs) if message.outputs else tuple(signature.outputs)
        inference = Inference(inputs, outputs, self._rows(inputs))
        if message.parameters:
            RequestParameters(message.parameters).apply(inference)
        return inference

    def _sources(
        self, tensors: Sequence[pb.ModelInferRequest.InferInputTensor], raw: Sequence[Buffer]
    ) -> Sequence[Buffer | None]:
        """The bytes of each input: shared memory where it says so, else the next raw contents, or none at all."""
        if len(raw) == len(tensors) and not any(tensor.parameters for tensor in tensors):
            return raw
        shared = [_in_region(tensor.parameters) for tensor in tensors]
        expected = len(tensors) - sum(shared)
        if raw and len(raw) != expected:
            raise self._wrong(
                "raw_input_contents",
                f"expected {expected} entries, one for each input that is not in shared memory; got {len(raw)}",
            )
        rest = iter(raw)
        return [
            self._region(index, tensor) if in_region else next(rest, None)
            for index, (tensor, in_region) in enumerate(zip(tensors, shared, strict=True))
        ]

    def _region(self, index: int, tensor: pb.ModelInferRequest.InferInputTensor) -> Buffer:
        region, offset, byte_size = region_of(f"inputs[{index}]", tensor.parameters)
        return self.read_region(region, offset, byte_size)

    def _input(self, index: int, tensor: pb.ModelInferRequest.InferInputTensor, raw: Buffer | None) -> Array:
        spec = self.signature.inputs.get(tensor.name)
        if spec is None:
            raise self._wrong(
                f"inputs[{index}].name",
                f"no input {tensor.name[:80]!r}; expected {_listed(self.signature.inputs)}",
            )
        if tensor.datatype != spec.datatype.name:
            raise self._wrong(
                f"inputs[{index}].datatype",
                f"input {spec.name!r}: expected {spec.datatype.name}; got {tensor.datatype[:20]!r}",
            )
        shape = tuple(tensor.shape)
        if not _shape_fits(shape, spec):
            raise self._wrong(
                f"inputs[{index}].shape", f"input {spec.name!r}: expected [{_axes(spec)}]; got {_short(shape)}"
            )
        try:
            if raw is None:
                return self._typed(index, tensor, spec)
            if tensor.HasField("contents"):
                raise self._wrong(
                    f"inputs[{index}].contents", f"input {spec.name!r}: expected none beside raw_input_contents"
                )
            return decode_raw(spec.datatype, shape, raw, any_bytes=self.any_bytes)
        except TensorError as error:
            where = f"inputs[{index}].contents" if raw is None else f"raw_input_contents[{index}]"
            raise self._wrong(where, f"input {spec.name!r}: {error}") from error

    def _typed(self, index: int, tensor: pb.ModelInferRequest.InferInputTensor, spec: Tensor) -> Array:
        if not tensor.HasField("contents") and 0 not in tensor.shape:
            raise self._wrong(
                f"inputs[{index}].contents",
                f"input {spec.name!r}: no data came; expected {spec.datatype.name} {_short(tensor.shape)} in "
                f"raw_input_contents or contents",
            )
        return decode_typed(spec.datatype, tensor.shape, tensor.contents, any_bytes=self.any_bytes)

    def _check_complete(self, inputs: Mapping[str, Array]) -> None:
        missing = [
            spec.name for spec in self.signature.inputs.values() if spec.name not in inputs and not spec.optional
        ]
        if missing:
            raise self._wrong("inputs", f"input {missing[0]!r} is missing; expected {_listed(self.signature.inputs)}")

    def _check_axes(self, tensors: Sequence[pb.ModelInferRequest.InferInputTensor]) -> None:
        """Dynamic axes with one name have one size, unless the configuration frees them."""
        sizes: dict[str, tuple[int, str]] = {}
        for index, tensor in enumerate(tensors):
            spec = self.signature.inputs[tensor.name]
            for axis, size in zip(spec.shape, tensor.shape, strict=True):
                if isinstance(axis, str) and axis not in spec.free:
                    known, first = sizes.setdefault(axis, (size, tensor.name))
                    if size != known:
                        raise self._wrong(
                            f"inputs[{index}].shape",
                            f"input {tensor.name!r}: expected axis {axis!r} to be {known} as in {first!r}; got {size}",
                        )

    def _rows(self, inputs: Mapping[str, Array]) -> int:
        if not self.signature.batched or not inputs:
            return 1
        rows = len(next(iter(inputs.values())))
        if rows > self.max_batch_size:
            raise self._wrong(
                "inputs[0].shape",
                f"input {next(iter(inputs))!r}: expected at most {self.max_batch_size} rows ({BATCH!r}); got {rows}. "
                f"Send them in several requests, or raise max_batch_size",
            )
        return rows

    def _outputs(self, requested: Sequence[pb.ModelInferRequest.InferRequestedOutputTensor]) -> tuple[str, ...]:
        names: dict[str, None] = {}
        for index, output in enumerate(requested):
            if output.name not in self.signature.outputs:
                expected = _listed(self.signature.outputs)
                raise self._wrong(f"outputs[{index}].name", f"no output {output.name[:80]!r}; expected {expected}")
            if output.name in names:
                raise self._wrong(f"outputs[{index}].name", f"output {output.name!r} was asked for twice")
            names[output.name] = None
        return tuple(names)

    def _wrong(self, field: str, description: str) -> InvalidFieldError:
        return InvalidFieldError.of(field, f"{self.title}: {description}")


def region_of(field: str, parameters: Mapping[str, pb.InferParameter]) -> tuple[str, int, int]:
    """The region of shared memory that a tensor's parameters name: name, offset and size in bytes.

    Raises `InvalidFieldError` where the parameters are no such thing.
    """
    name = parameters[REGION].string_param
    if BYTE_SIZE not in parameters:
        raise InvalidFieldError.of(f"{field}.parameters", f"expected {BYTE_SIZE!r} beside {REGION!r}")
    return name, _whole(field, parameters, OFFSET), _whole(field, parameters, BYTE_SIZE)


def _whole(field: str, parameters: Mapping[str, pb.InferParameter], key: str) -> int:
    if key not in parameters:
        return 0
    parameter = parameters[key]
    choice = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, choice) if choice in ("int64_param", "uint64_param") else -1
    if value < 0:
        raise InvalidFieldError.of(f"{field}.parameters[{key}]", "expected a whole number of bytes, at least 0")
    return int(value)


def _in_region(parameters: Mapping[str, pb.InferParameter]) -> bool:
    return REGION in parameters


def _shape_fits(shape: Sequence[int], spec: Tensor) -> bool:
    if len(shape) != len(spec.shape):
        return False
    for size, axis in zip(shape, spec.shape, strict=True):
        if size != axis and (isinstance(axis, int) or size < 0):
            return False
    return True


def _axes(spec: Tensor) -> str:
    return ", ".join(map(str, spec.shape))


def _short(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape[:16]))}{', …' if len(shape) > 16 else ''}]"


def _listed(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"'{tensor}'" for tensor in tensors.values())
