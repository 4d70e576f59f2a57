"""Rows of different lengths, padded into buckets so that they can share a run.

The model says so in its configuration's parameters: `pad_axis` names the dynamic axis, `pad_buckets` lists the lengths
to pad to (`16,32,64,128`), and `pad_value:<input>` is what an input is padded with, 0 where it is left out. Only a
model that does not see the padding, by a mask for example, gives the answers it gives without.
"""

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from penstock.inference.signature import Tensor
from penstock.inference.tensors import Array
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import WrongStateError

AXIS, BUCKETS, VALUE = "pad_axis", "pad_buckets", "pad_value:"


@dataclass(frozen=True)
class Padding:
    """The axis by its name in the signature, the lengths in rising order, and what each input is padded with."""

    axis: str
    buckets: tuple[int, ...]
    values: Mapping[str, float]

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
