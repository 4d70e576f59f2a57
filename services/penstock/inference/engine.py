"""What the inference service asks of a runtime. ONNX Runtime is one, in `penstock.inference.onnx_engine`."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from penstock.inference.tensors import Array


class Stop(Protocol):
    """Ends a run in progress, from any thread. A run that has ended takes no notice."""

    def stop(self) -> None:
        """Makes the run raise as soon as the runtime looks."""


class Engine(Protocol):
    """One instance of an opened model. Its owner calls `run` from one thread at a time, and nothing after `close`."""

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None) -> list[Array]:
        """The named outputs, in that order, for inputs that agree with the signature.

        Blocks, and frees the GIL while it computes. Arrays have the dtypes of `penstock.inference.tensors`; elements of
        string tensors are `str`. Inputs may be read-only. `stop` is what `stopper` gave.
        Raises `penstock.rpc.errors.PenstockError` if the model cannot compute them.
        """

    def stopper(self) -> Stop:
        """What can stop the one run that it is given to."""

    def close(self) -> None:
        """Gives the model's memory back."""
