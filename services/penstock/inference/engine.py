"""What the inference service asks of a runtime. ONNX Runtime is one, in `penstock.inference.onnx_engine`."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from penstock.inference.tensors import Array


class Engine(Protocol):
    """One opened model. Its owner calls `run` from one thread at a time, and nothing after `close`."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """The named outputs, in that order, for inputs that agree with the signature.

        Blocks, and frees the GIL while it computes. Arrays have the dtypes of `penstock.inference.tensors`; elements of
        string tensors are `str`. Inputs may be read-only.
        Raises `penstock.rpc.errors.PenstockError` if the model cannot compute them.
        """

    def close(self) -> None:
        """Gives the model's memory back."""
