"""An engine that runs when the test lets it, behind the real repository: what waits, and for whom, is then exact."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from penstock.api.registry.v1.deployment_service_pb2 import DesiredModel, DesiredVersion, WatchResponse
from penstock.api.registry.v1.model_pb2 import Version
from penstock.api.types.v1.signature_pb2 import Dimension, TensorSpec
from penstock.api.types.v1.signature_pb2 import Signature as SignatureMessage
from penstock.inference.loader import Loaded
from penstock.inference.signature import Signature
from penstock.inference.tensors import Array
from penstock.rpc.errors import PenstockError

POISON = 13.0


class GatedEngine:
    """`scaled` = twice `rows`, [batch, any]. Every run waits for the gate; a run with a `POISON` in it fails."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.runs: list[Array] = []
        self.closed = False

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        self.runs.append(inputs["rows"])
        if not self.gate.acquire(timeout=20):
            raise TimeoutError("the test never opened the gate")
        if (inputs["rows"] == POISON).any():
            raise PenstockError("Poisoned rows.")
        return [{"scaled": inputs["rows"] * 2, "count": np.ones_like(inputs["rows"][:, :1])}[name] for name in outputs]

    def close(self) -> None:
        self.closed = True

    def open(self) -> None:
        """Lets every run pass from now on."""
        self.gate.release(10_000)


def signature_message(batch: str = "batch") -> SignatureMessage:
    def spec(name: str, axis: str) -> TensorSpec:
        return TensorSpec(name=name, datatype="FP32", shape=[Dimension(name=batch), Dimension(name=axis)])

    return SignatureMessage(inputs=[spec("rows", "width")], outputs=[spec("scaled", "width"), spec("count", "one")])


def version(number: int, model: str = "gated") -> Version:
    return Version(model=model, number=number, signature=signature_message(), bundle_digest=f"sha256:{model}-{number}")


def desired(revision: int, *targets: tuple[Version, int]) -> WatchResponse:
    """A desired state with one model."""
    versions = [DesiredVersion(version=one, weight=weight) for one, weight in targets]
    return WatchResponse(revision=revision, models=[DesiredModel(model=targets[0][0].model, versions=versions)])


class GatedLoader:
    """Hands out a `GatedEngine` for each version number, once the test says how the load ends."""

    def __init__(self) -> None:
        self.engines: defaultdict[int, GatedEngine] = defaultdict(GatedEngine)
        self.kept: set[str] = set()
        self._outcomes: defaultdict[int, asyncio.Future[None]] = defaultdict(asyncio.get_running_loop().create_future)

    def succeed(self, number: int) -> None:
        self._outcomes[number].set_result(None)

    def fail(self, number: int, message: str) -> None:
        """Fails the load that waits or comes next; the one after that waits again."""
        self._outcomes.pop(number, asyncio.get_running_loop().create_future()).set_exception(PenstockError(message))

    async def load(self, version: Version) -> Loaded:
        await asyncio.shield(self._outcomes[version.number])
        return Loaded(Signature.of(version.signature), self.engines[version.number])

    def prune(self, keep: set[str]) -> None:
        self.kept = keep
