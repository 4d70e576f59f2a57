"""One version's life on this server."""

import asyncio
import enum
import time
from collections.abc import Callable

import structlog

from penstock.api.registry.v1.model_pb2 import Version
from penstock.inference.backoff import delays_s
from penstock.inference.batcher import Batcher, BatchLimits, Inference
from penstock.inference.loader import Loaded, Loader
from penstock.inference.signature import Signature
from penstock.inference.tensors import Array
from penstock.rpc.errors import NotReadyError, PenstockError, UnimplementedError

_log = structlog.get_logger("penstock.inference.version")


class State(enum.Enum):
    """LOADING → READY → DRAINING, or LOADING → FAILED, from where it is tried again and may become READY."""

    LOADING = enum.auto()
    READY = enum.auto()
    DRAINING = enum.auto()
    FAILED = enum.auto()


class ServedVersion:
    """A version from when it is wanted until its memory is given back. Calls `on_change` when its state has changed."""

    def __init__(self, version: Version, loader: Loader, limits: BatchLimits, on_change: Callable[[], None]) -> None:
        self.version = version
        self.state = State.LOADING
        self.update_time_s = time.time()
        self._loader = loader
        self._limits = limits
        self._on_change = on_change
        self._failure: PenstockError | None = None
        self._signature: Signature | None = None
        self._batcher: Batcher | None = None
        self._try_again = asyncio.Event()
        self._loading = asyncio.create_task(self._load())

    @property
    def title(self) -> str:
        return f"Model {self.version.model!r} version {self.version.number}"

    @property
    def max_batch_size(self) -> int:
        return self._limits.max_batch_size

    @property
    def message(self) -> str:
        """Why it is FAILED; else empty."""
        return self._failure.message if self._failure and self.state is State.FAILED else ""

    @property
    def signature(self) -> Signature:
        """What it takes and gives. Raises `NotReadyError` unless READY, `UnimplementedError` if it never can be."""
        if self.state is State.READY and self._signature is not None:
            return self._signature
        if isinstance(self._failure, UnimplementedError):
            raise UnimplementedError(f"{self.title} cannot be served: {self._failure.message}")
        if self._failure is not None:
            raise NotReadyError(f"{self.title} failed to load and is tried again: {self._failure.message}")
        doing = "loading" if self.state is State.LOADING else "being unloaded"
        raise NotReadyError(f"{self.title} is {doing}. Send the request again after a pause.")

    async def infer(self, inference: Inference) -> list[Array]:
        """The wanted outputs. Raises as `signature` and `Batcher.infer` do."""
        if self._batcher is None:
            raise NotReadyError(f"{self.title} is not loaded. Send the request again after a pause.")
        return await self._batcher.infer(inference)

    def try_again(self) -> None:
        """Cuts the pause before the next try of a FAILED version short."""
        self._try_again.set()

    async def close(self) -> None:
        """Takes no new requests, finishes the ones it has, gives the memory back. A load in progress is given up."""
        self._enter(State.DRAINING)
        self._loading.cancel()
        await asyncio.wait([self._loading])
        if self._batcher is not None:
            await self._batcher.close()
        _log.info("version unloaded", model=self.version.model, version=self.version.number)

    async def _load(self) -> None:
        for delay_s in delays_s():
            self._try_again.clear()
            try:
                loaded = await self._loader.load(self.version)
            except PenstockError as error:
                self._fail(error)
            except Exception as error:
                _log.exception("unexpected error while loading", model=self.version.model, version=self.version.number)
                self._fail(PenstockError(f"Unexpected {type(error).__name__} while loading; the log has the details."))
            else:
                self._serve(loaded)
                return
            try:
                async with asyncio.timeout(delay_s):
                    await self._try_again.wait()
            except TimeoutError:
                continue

    def _serve(self, loaded: Loaded) -> None:
        self._failure = None
        self._signature = loaded.signature
        self._batcher = Batcher(self.title, loaded.engine, loaded.signature, self._limits)
        _log.info("version ready", model=self.version.model, version=self.version.number)
        self._enter(State.READY)

    def _fail(self, error: PenstockError) -> None:
        known = self._failure is not None and self._failure.message == error.message
        self._failure = error
        if not known:
            _log.error("version failed", model=self.version.model, version=self.version.number, error=error.message)
            self._enter(State.FAILED)

    def _enter(self, state: State) -> None:
        self.state = state
        self.update_time_s = time.time()
        self._on_change()
