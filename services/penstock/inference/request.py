"""From a ModelInferRequest to an inference that agrees with a version's signature, or to a refusal that says why."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from penstock.inference.batcher import Inference
from penstock.inference.signature import BATCH, Signature, Tensor
from penstock.inference.tensors import Array, TensorError, decode_raw, decode_typed
from penstock.oip import inference_pb2 as pb
from penstock.rpc.errors import InvalidFieldError, UnimplementedError

# Parameters that change what a request means: to ignore one would give a wrong answer.
_UNSERVED = frozenset({"sequence_id", "sequence_start", "sequence_end", "priority"})
_UNSERVED_ON_TENSORS = frozenset(
    {"classification", "shared_memory_region", "shared_memory_byte_size", "shared_memory_offset"}
)
_RESERVED = "triton_"


@dataclass(frozen=True)
class RequestReader:
    """Reads requests to one version. `title` names it in errors."""

    title: str
    signature: Signature
    max_batch_size: int

    def read(self, request: pb.ModelInferRequest) -> Inference:
        """The request's inference; its inputs are views of the request's bytes where those came raw.

        Raises `InvalidFieldError` that names the tensor, what was expected and what came; `UnimplementedError` for a
        parameter that would change the answer and is not served.
        """
        _check_parameters(request)
        raw = request.raw_input_contents
        if raw and len(raw) != len(request.inputs):
            raise self._wrong(
                "raw_input_contents", f"expected {len(request.inputs)} entries, one for each input; got {len(raw)}"
            )
        inputs: dict[str, Array] = {}
        for index, tensor in enumerate(request.inputs):
            if tensor.name in inputs:
                raise self._wrong(f"inputs[{index}].name", f"input {tensor.name!r} came twice")
            inputs[tensor.name] = self._input(index, tensor, raw[index] if raw else None)
        if missing := [name for name in self.signature.inputs if name not in inputs]:
            raise self._wrong("inputs", f"input {missing[0]!r} is missing; expected {_listed(self.signature.inputs)}")
        self._check_axes(request.inputs)
        return Inference(inputs, self._outputs(request.outputs), self._rows(inputs))

    def _input(self, index: int, tensor: pb.ModelInferRequest.InferInputTensor, raw: bytes | None) -> Array:
        field = f"inputs[{index}]"
        spec = self.signature.inputs.get(tensor.name)
        if spec is None:
            raise self._wrong(
                f"{field}.name", f"no input {tensor.name[:80]!r}; expected {_listed(self.signature.inputs)}"
            )
        if tensor.datatype != spec.datatype.name:
            raise self._wrong(
                f"{field}.datatype",
                f"input {spec.name!r}: expected {spec.datatype.name}; got {tensor.datatype[:20]!r}",
            )
        if not _shape_fits(tensor.shape, spec):
            raise self._wrong(
                f"{field}.shape", f"input {spec.name!r}: expected [{_axes(spec)}]; got {_short(tensor.shape)}"
            )
        try:
            if raw is None:
                return self._typed(field, tensor, spec)
            if tensor.HasField("contents"):
                raise self._wrong(f"{field}.contents", f"input {spec.name!r}: expected none beside raw_input_contents")
            return decode_raw(spec.datatype, tensor.shape, raw)
        except TensorError as error:
            where = f"{field}.contents" if raw is None else f"raw_input_contents[{index}]"
            raise self._wrong(where, f"input {spec.name!r}: {error}") from error

    def _typed(self, field: str, tensor: pb.ModelInferRequest.InferInputTensor, spec: Tensor) -> Array:
        if not tensor.HasField("contents") and 0 not in tensor.shape:
            raise self._wrong(
                f"{field}.contents",
                f"input {spec.name!r}: no data came; expected {spec.datatype.name} {_short(tensor.shape)} in "
                f"raw_input_contents or contents",
            )
        return decode_typed(spec.datatype, tensor.shape, tensor.contents)

    def _check_axes(self, tensors: Sequence[pb.ModelInferRequest.InferInputTensor]) -> None:
        """Dynamic axes with one name have one size."""
        sizes: dict[str, tuple[int, str]] = {}
        for index, tensor in enumerate(tensors):
            for axis, size in zip(self.signature.inputs[tensor.name].shape, tensor.shape, strict=True):
                if isinstance(axis, str):
                    known, first = sizes.setdefault(axis, (size, tensor.name))
                    if size != known:
                        raise self._wrong(
                            f"inputs[{index}].shape",
                            f"input {tensor.name!r}: expected axis {axis!r} to be {known} as in {first!r}; got {size}",
                        )

    def _rows(self, inputs: Mapping[str, Array]) -> int:
        if not self.signature.batched:
            return 1
        rows: int = next(iter(inputs.values())).shape[0]
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
        return tuple(names or self.signature.outputs)

    def _wrong(self, field: str, description: str) -> InvalidFieldError:
        return InvalidFieldError.of(field, f"{self.title}: {description}")


def timeout_s(request: pb.ModelInferRequest) -> float | None:
    """The parameter `timeout`, microseconds on the wire, in seconds; None where it is absent or 0.

    Raises `InvalidFieldError` if it is no whole number of at least 0.
    """
    if "timeout" not in request.parameters:
        return None
    parameter = request.parameters["timeout"]
    choice = parameter.WhichOneof("parameter_choice")
    value = getattr(parameter, choice) if choice in ("int64_param", "uint64_param") else -1
    if value < 0:
        raise InvalidFieldError.of(
            "parameters[timeout]", "expected microseconds as int64_param or uint64_param, at least 0"
        )
    return value / 1e6 or None


def _check_parameters(request: pb.ModelInferRequest) -> None:
    """Keys that nobody has given a meaning are the caller's own and pass."""
    for key in request.parameters:
        if key.startswith(_RESERVED):
            raise InvalidFieldError.of(f"parameters[{key[:80]}]", f"keys that begin with {_RESERVED!r} are reserved")
        if key in _UNSERVED:
            raise UnimplementedError(
                f"parameters[{key}]: this server has no sequences and no priorities. Leave it out."
            )
    for index, tensor in enumerate(request.inputs):
        _check_tensor_parameters(f"inputs[{index}]", tensor.parameters)
    for index, output in enumerate(request.outputs):
        _check_tensor_parameters(f"outputs[{index}]", output.parameters)


def _check_tensor_parameters(field: str, parameters: Mapping[str, pb.InferParameter]) -> None:
    for key in _UNSERVED_ON_TENSORS.intersection(parameters):
        raise UnimplementedError(
            f"{field}.parameters[{key}]: this server has no shared memory and no classification. Send and take whole "
            f"tensors in the messages."
        )


def _shape_fits(shape: Sequence[int], spec: Tensor) -> bool:
    return len(shape) == len(spec.shape) and all(
        size == axis if isinstance(axis, int) else size >= 0 for size, axis in zip(shape, spec.shape, strict=True)
    )


def _axes(spec: Tensor) -> str:
    return ", ".join(map(str, spec.shape))


def _short(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape[:16]))}{', …' if len(shape) > 16 else ''}]"


def _listed(tensors: Mapping[str, Tensor]) -> str:
    return ", ".join(f"'{tensor}'" for tensor in tensors.values())
