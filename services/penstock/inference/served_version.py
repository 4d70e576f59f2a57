"""One version's life on this server."""

import asyncio
import enum
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass

import structlog

from penstock.inference.backoff import delays_s
from penstock.inference.inference import Inference, Loaded
from penstock.inference.memory import give_back
from penstock.inference.signature import Signature
from penstock.inference.statistics import Statistics
from penstock.inference.tensors import Array
from penstock.inference.wanted import WantedVersion
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import NotReadyError, PenstockError, UnimplementedError

_log = structlog.get_logger("penstock.inference.version")


class State(enum.Enum):
    """LOADING → READY → DRAINING, or LOADING → FAILED, from where it is tried again and may become READY."""

    LOADING = enum.auto()
    READY = enum.auto()
    DRAINING = enum.auto()
    FAILED = enum.auto()


@dataclass(frozen=True)
class _Description:
    """What is left of a version whose memory is given back."""

    signature: Signature
    labels: Mapping[str, Sequence[str]]


class ServedVersion:
    """A version from when it is wanted until its memory is given back. Calls `on_change` when its state has changed.

    A version that failed is tried again after a pause if it `retries`, else only when somebody says `try_again`.
    """

    def __init__(self, wanted: WantedVersion, on_change: Callable[["ServedVersion"], None], *, retries: bool) -> None:
        self.wanted = wanted
        self.state = State.LOADING
        self.update_time_s = time.time()
        # How long the last try to load it took.
        self.load_ns = 0
        self._on_change = on_change
        self._retries = retries
        self._failure: PenstockError | None = None
        self._loaded: Loaded | None = None
        self._drained: _Description | None = None
        self._again = asyncio.Event()
        self._loading = asyncio.create_task(self._load())

    @property
    def model(self) -> str:
        return self.wanted.model

    @property
    def number(self) -> int:
        return self.wanted.number

    @property
    def title(self) -> str:
        return f"Model {self.model!r} version {self.number}"

    @property
    def message(self) -> str:
        """Why it is FAILED; else empty."""
        return self._failure.message if self._failure and self.state is State.FAILED else ""

    @property
    def loaded(self) -> Loaded:
        """What serves it. Raises `NotReadyError` unless READY, `UnimplementedError` if it never can be."""
        if self.state is State.READY and self._loaded is not None:
            return self._loaded
        if isinstance(self._failure, UnimplementedError):
            raise UnimplementedError(f"{self.title} cannot be served: {self._failure.message}")
        if self._failure is not None and self.state is not State.DRAINING:
            again = " and is tried again" if self._retries else ""
            raise NotReadyError(f"{self.title} failed to load{again}: {self._failure.message}")
        doing = "loading" if self.state is State.LOADING else "being unloaded"
        raise NotReadyError(f"{self.title} is {doing}. Send the request again after a pause.")

    @property
    def signature(self) -> Signature:
        """What it takes and gives. Raises as `loaded`, and so do the properties below.

        This one and `labels` stay while it drains: the answers of requests in flight are still to be written.
        """
        return (self._drained or self.loaded).signature

    @property
    def config(self) -> ModelConfig:
        return self.loaded.config

    @property
    def labels(self) -> Mapping[str, Sequence[str]]:
        return (self._drained or self.loaded).labels

    @property
    def statistics(self) -> Statistics:
        return self.loaded.statistics

    @property
    def pending(self) -> int:
        """Requests that wait."""
        return self._loaded.scheduler.pending if self._loaded is not None else 0

    async def infer(self, inference: Inference) -> list[Array]:
        """The wanted outputs. Raises as `loaded` and `Scheduler.infer` do."""
        return await self._held.scheduler.infer(inference)

    def stream(self, inference: Inference) -> AsyncGenerator[list[Array]]:
        """The answers one by one, as `Scheduler.stream` gives them."""
        return self._held.scheduler.stream(inference)

    def try_again(self) -> None:
        """Loads a FAILED version again, at once."""
        if self.state is not State.FAILED:
            return
        if not self._retries:
            # Who asked waits for the outcome; a version that is tried again and again meanwhile counts as settled.
            self._failure = None
            self._enter(State.LOADING)
        self._again.set()

    async def close(self) -> None:
        """Takes no new requests, finishes the ones it has, gives the memory back. A load in progress is given up."""
        if self._loaded is not None:
            self._drained = _Description(self._loaded.signature, self._loaded.labels)
        self._enter(State.DRAINING)
        self._loading.cancel()
        await asyncio.wait([self._loading])
        if self._loaded is not None:
            await self._loaded.scheduler.close()
            self._loaded = None
            await asyncio.to_thread(give_back)
        _log.info("version unloaded", model=self.model, version=self.number)

    @property
    def _held(self) -> Loaded:
        """A request that was routed before the version began to drain is for its scheduler to answer or to refuse."""
        return self._loaded if self._loaded is not None else self.loaded

    async def _load(self) -> None:
        for delay_s in delays_s():
            self._again.clear()
            started_ns = time.perf_counter_ns()
            try:
                loaded = await self._timed_load(started_ns)
            except PenstockError as error:
                self._fail(error)
            except Exception as error:
                _log.exception("unexpected error while loading", model=self.model, version=self.number)
                self._fail(PenstockError(f"Unexpected {type(error).__name__} while loading; the log has the details."))
            else:
                self._serve(loaded)
                return
            try:
                async with asyncio.timeout(delay_s if self._retries else None):
                    await self._again.wait()
            except TimeoutError:
                continue

    async def _timed_load(self, started_ns: int) -> Loaded:
        try:
            return await self.wanted.source.load()
        finally:
            self.load_ns = time.perf_counter_ns() - started_ns

    def _serve(self, loaded: Loaded) -> None:
        self._failure = None
        self._loaded = loaded
        _log.info("version ready", model=self.model, version=self.number)
        self._enter(State.READY)

    def _fail(self, error: PenstockError) -> None:
        # What tells how it came to this holds the frames of the attempt, and these the half-opened model's memory.
        error.__cause__ = error.__context__ = None
        error.with_traceback(None)
        known = self._failure is not None and self._failure.message == error.message
        self._failure = error
        if not known:
            _log.error("version failed", model=self.model, version=self.number, error=error.message)
            self._enter(State.FAILED)

    def _enter(self, state: State) -> None:
        self.state = state
        self.update_time_s = time.time()
        self._on_change(self)
