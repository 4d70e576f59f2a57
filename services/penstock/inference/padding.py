"""Rows of different lengths, padded into buckets so that they can share a run.

The model says so in its configuration's parameters: `pad_axis` names the dynamic axis, `pad_buckets` lists the lengths
to pad to (`16,32,64,128`), and `pad_value:<input>` is what an input is padded with, 0 where it is left out. Only a
model that does not see the padding, by a mask for example, gives the answers it gives without.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from penstock.inference.signature import BATCH, Signature, Tensor
from penstock.inference.tensors import BOOL, BYTES, Array, Datatype
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import WrongStateError

# Rows of a run times the length of the longest bucket: short rows become long ones in memory.
MAX_PADDED = 2**24

AXIS, BUCKETS, VALUE = "pad_axis", "pad_buckets", "pad_value:"


@dataclass(frozen=True)
class Padding:
    """The axis by its name in the signature, the lengths in rising order, and what each input is padded with."""

    axis: str
    buckets: tuple[int, ...]
    values: Mapping[str, float]

    def check(self, signature: Signature, max_batch_size: int) -> None:
        """Raises `WrongStateError` where the inputs of a signature cannot be padded like this."""
        if not signature.batched:
            raise _wrong(f"{AXIS} needs a model with a batch axis, because padded rows share runs")
        if self.axis == BATCH:
            raise _wrong(f"{AXIS} expected a dynamic axis other than {BATCH!r}, which is not padded")
        if self.buckets[-1] * max_batch_size > MAX_PADDED:
            raise _wrong(
                f"{BUCKETS} expected lengths of at most {MAX_PADDED // max_batch_size} with a max_batch_size of "
                f"{max_batch_size}; got {self.buckets[-1]}"
            )
        padded = [tensor for tensor in signature.inputs.values() if self.axis in tensor.shape]
        if all(tensor.optional for tensor in padded):
            known = {axis for tensor in signature.inputs.values() for axis in tensor.shape[1:] if isinstance(axis, str)}
            raise _wrong(
                f"{AXIS} expected a dynamic axis of an input that is not optional, of "
                f"{', '.join(sorted(known)) or 'which there is none'}; got {self.axis[:80]!r}"
            )
        if twice := [one for one in (*padded, *signature.outputs.values()) if one.shape.count(self.axis) > 1]:
            raise _wrong(f"{AXIS} {self.axis!r} stands twice in '{twice[0]}', and one of them would not be padded")
        if texts := [tensor for tensor in padded if tensor.datatype is BYTES]:
            raise _wrong(f"{AXIS} {self.axis!r} is one of input '{texts[0]}', and text cannot be padded")
        by_name = {tensor.name: tensor for tensor in padded}
        for name, value in self.values.items():
            if name not in by_name:
                raise _wrong(f"{VALUE}{name[:80]} expected an input with axis {self.axis!r}: {', '.join(by_name)}")
            if not _fits(value, by_name[name].datatype):
                raise _wrong(f"{VALUE}{name} expected a value of {by_name[name].datatype.name}; got {value:g}")

    def bucket(self, length: int) -> int:
        """The length to pad to; a length above every bucket stays as it is."""
        index = bisect_left(self.buckets, length)
        return self.buckets[index] if index < len(self.buckets) else length

    def axis_of(self, tensor: Tensor) -> int | None:
        """Where the padded axis stands in a tensor."""
        return tensor.shape.index(self.axis) if self.axis in tensor.shape else None

    def padded(self, tensor: Tensor, array: Array) -> Array:
        """The array, its padded axis as long as its bucket."""
        at = self.axis_of(tensor)
        if at is None or (missing := self.bucket(array.shape[at]) - array.shape[at]) == 0:
            return array
        widths = [(0, missing if index == at else 0) for index in range(array.ndim)]
        return np.pad(array, widths, constant_values=self.values.get(tensor.name, 0))

    def trimmed(self, tensor: Tensor, array: Array, length: int) -> Array:
        """The array without what was padded to it."""
        at = self.axis_of(tensor)
        if at is None:
            return array
        return array[(slice(None),) * at + (slice(length),)]


def _wrong(text: str) -> WrongStateError:
    return WrongStateError(f"The configuration's parameter {text}.")


def _fits(value: float, datatype: Datatype) -> bool:
    """Whether a datatype has a value, exactly or, of a fraction, nearly."""
    if datatype is BOOL:
        return value in (0, 1)
    if datatype.dtype.kind in "iu":
        limits = np.iinfo(datatype.dtype)
        return value.is_integer() and limits.min <= value <= limits.max
    # Too large a number becomes infinite.
    with np.errstate(over="ignore"):
        return math.isinf(value) or not math.isinf(float(np.float64(value).astype(datatype.dtype)))


def padding_of(config: ModelConfig) -> Padding | None:
    """Raises `WrongStateError` for parameters that make no sense."""
    parameters = {key: parameter.string_value for key, parameter in config.parameters.items()}
    if AXIS not in parameters and BUCKETS not in parameters:
        return None
    try:
        axis, buckets = parameters[AXIS], tuple(sorted(int(length) for length in parameters[BUCKETS].split(",")))
        values = {key.removeprefix(VALUE): float(text) for key, text in parameters.items() if key.startswith(VALUE)}
    except (KeyError, ValueError) as error:
        raise WrongStateError(
            f"The configuration's parameters {AXIS!r} and {BUCKETS!r} belong together, the name of a dynamic axis and "
            f"lengths like '16,32,64': {error}."
        ) from error
    if buckets[0] < 1:
        raise WrongStateError(f"The configuration's parameter {BUCKETS!r} needs lengths of at least 1; got {buckets}.")
    return Padding(axis, buckets, values)
