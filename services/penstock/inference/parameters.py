"""The parameters of a request: those that the protocol gives a meaning, and the caller's own."""

from collections.abc import Mapping

from penstock.inference.inference import Inference, Parameter, SequenceStep
from penstock.oip import inference_pb2 as pb
from penstock.rpc.errors import InvalidFieldError

EMPTY_FINAL_RESPONSE = "triton_enable_empty_final_response"
TIMINGS = "penstock_timings"
_RESERVED = "triton_"
# Ids of sequences are kept for as long as those live.
_MAX_SEQUENCE_ID = 256
_OURS = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", EMPTY_FINAL_RESPONSE, TIMINGS}
)


class RequestParameters:
    """Reads the parameters of one request."""

    def __init__(self, parameters: Mapping[str, pb.InferParameter]) -> None:
        self._parameters = parameters

    def apply(self, inference: Inference) -> None:
        """Gives an inference what its request's parameters say. Raises `InvalidFieldError` for one that is wrong."""
        for key in self._parameters:
            if key.startswith(_RESERVED) and key not in _OURS:
                raise InvalidFieldError.of(
                    f"parameters[{key[:80]}]", f"keys that begin with {_RESERVED!r} are reserved"
                )
        inference.priority = self._whole("priority", "a level")
        inference.timeout_us = self._whole("timeout", "microseconds")
        inference.sequence = self._sequence()
        inference.parameters = {
            key: _value(parameter) for key, parameter in self._parameters.items() if key not in _OURS
        }

    def flag(self, key: str) -> bool:
        """A parameter that is true or false; false where it is absent."""
        if key not in self._parameters:
            return False
        parameter = self._parameters[key]
        if parameter.WhichOneof("parameter_choice") != "bool_param":
            raise InvalidFieldError.of(f"parameters[{key}]", "expected a bool_param")
        return parameter.bool_param

    def _sequence(self) -> SequenceStep | None:
        """None where the request belongs to no sequence: its id is absent, 0 or empty."""
        if "sequence_id" not in self._parameters:
            return None
        parameter = self._parameters["sequence_id"]
        choice = parameter.WhichOneof("parameter_choice")
        if choice == "string_param":
            identity: int | str = parameter.string_param
            if len(parameter.string_param) > _MAX_SEQUENCE_ID:
                raise InvalidFieldError.of(
                    "parameters[sequence_id]",
                    f"expected {_MAX_SEQUENCE_ID} characters at most; got {len(parameter.string_param)}",
                )
        else:
            identity = self._whole("sequence_id", "a sequence, or its name as string_param,")
        if not identity:
            return None
        return SequenceStep(identity, self.flag("sequence_start"), self.flag("sequence_end"))

    def _whole(self, key: str, what: str) -> int:
        if key not in self._parameters:
            return 0
        parameter = self._parameters[key]
        choice = parameter.WhichOneof("parameter_choice")
        value = getattr(parameter, choice) if choice in ("int64_param", "uint64_param") else -1
        if value < 0:
            raise InvalidFieldError.of(
                f"parameters[{key}]", f"expected {what} as int64_param or uint64_param, at least 0"
            )
        return int(value)


def _value(parameter: pb.InferParameter) -> Parameter:
    choice = parameter.WhichOneof("parameter_choice")
    value: Parameter = getattr(parameter, choice) if choice else ""
    return value
