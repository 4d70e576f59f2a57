"""An engine that runs when the test lets it, behind the real repository: what waits, and for whom, is then exact."""

import asyncio
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from penstock.api.types.v1.signature_pb2 import Dimension, TensorSpec
from penstock.api.types.v1.signature_pb2 import Signature as SignatureMessage
from penstock.inference.batch_options import BatchOptions, QueuePolicy
from penstock.inference.batcher import Batcher
from penstock.inference.engine import Stop
from penstock.inference.inference import Loaded
from penstock.inference.instance import Instance
from penstock.inference.signature import Signature
from penstock.inference.statistics import Statistics
from penstock.inference.tensors import Array
from penstock.inference.wanted import Desired, WantedVersion
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import PenstockError

POISON = 13.0


class GatedEngine:
    """`scaled` = twice `rows`, [batch, any]. Every run waits for the gate; a run with a `POISON` in it fails."""

    def __init__(self) -> None:
        self.gate = threading.Semaphore(0)
        self.runs: list[Array] = []
        self.closed = False
        self.stopped = False

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str], stop: Stop | None = None) -> list[Array]:
        self.runs.append(inputs["rows"])
        if not self.gate.acquire(timeout=20):
            raise TimeoutError("the test never opened the gate")
        if (inputs["rows"] == POISON).any():
            raise PenstockError("Poisoned rows.")
        return [{"scaled": inputs["rows"] * 2, "count": np.ones_like(inputs["rows"][:, :1])}[name] for name in outputs]

    def stopper(self) -> Stop:
        return self

    def stop(self) -> None:
        self.stopped = True

    def close(self) -> None:
        self.closed = True

    def open(self) -> None:
        """Lets every run pass from now on."""
        self.gate.release(10_000)


def signature_message(batch: str = "batch") -> SignatureMessage:
    def spec(name: str, axis: str) -> TensorSpec:
        return TensorSpec(name=name, datatype="FP32", shape=[Dimension(name=batch), Dimension(name=axis)])

    return SignatureMessage(inputs=[spec("rows", "width")], outputs=[spec("scaled", "width"), spec("count", "one")])


class GatedLoader:
    """Hands out a `GatedEngine` for each version number, once the test says how the load ends."""

    def __init__(self, max_batch_size: int = 4, max_queue_size: int = 10) -> None:
        self.engines: defaultdict[int, GatedEngine] = defaultdict(GatedEngine)
        self.kept: set[str] = set()
        self._options = BatchOptions(max_batch_size, QueuePolicy(max_queue_size))
        self._outcomes: defaultdict[int, asyncio.Future[None]] = defaultdict(asyncio.get_running_loop().create_future)

    def succeed(self, number: int) -> None:
        self._outcomes[number].set_result(None)

    def fail(self, number: int, message: str) -> None:
        """Fails the load that waits or comes next; the one after that waits again."""
        self._outcomes.pop(number, asyncio.get_running_loop().create_future()).set_exception(PenstockError(message))

    def version(self, number: int, weight: int = 100) -> WantedVersion:
        return WantedVersion("gated", number, f"sha256:gated-{number}", weight, GatedSource(self, number))

    def desired(self, revision: int, *targets: tuple[int, int]) -> Desired:
        """A desired state with one model: numbers and weights."""
        return Desired.of(revision, [self.version(number, weight) for number, weight in targets])

    async def load(self, number: int) -> Loaded:
        await asyncio.shield(self._outcomes[number])
        signature, statistics = Signature.of(signature_message()), Statistics()
        instance = Instance(self.engines[number], signature, None, loop_rows=0)
        scheduler = Batcher(f"Model 'gated' version {number}", [instance], signature, self._options, statistics)
        config = ModelConfig(name="gated", max_batch_size=self._options.max_batch_size)
        return Loaded(signature, config, {}, scheduler, statistics)

    def prune(self, keep: set[str]) -> None:
        self.kept = keep


class GatedSource:
    """One of a loader's versions."""

    def __init__(self, loader: GatedLoader, number: int) -> None:
        self._loader = loader
        self._number = number
        self.keeps = (f"file-{number}",)

    async def load(self) -> Loaded:
        return await self._loader.load(self._number)
