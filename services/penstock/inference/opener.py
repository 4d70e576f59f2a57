"""Opens models of every kind, and chooses who schedules their requests."""

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from penstock.inference.batch_options import BatchOptions
from penstock.inference.batcher import Batcher
from penstock.inference.cached import CachedScheduler
from penstock.inference.config_limits import check_limits
from penstock.inference.engine import Engine
from penstock.inference.ensemble import EnsembleScheduler
from penstock.inference.ensemble_graph import Lookup
from penstock.inference.inference import Loaded, Scheduler
from penstock.inference.instance import Instance
from penstock.inference.model_config import ENSEMBLE, PYTHON, backend_of, completed, declared_signature
from penstock.inference.onnx_model import OnnxOptions, open_onnx_model
from penstock.inference.opening import ModelFiles
from penstock.inference.python_model import open_python_model
from penstock.inference.python_scheduler import PythonScheduler, StreamLimits
from penstock.inference.response_cache import ResponseCache
from penstock.inference.sequences import SequenceLimits, SequenceScheduler, visible
from penstock.inference.signature import Signature
from penstock.inference.statistics import Statistics
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import PenstockError

# Sequences of one version that live at once, where its configuration names no number of candidates.
_MAX_SEQUENCES = 10_000


class ModelOpener:
    """The `Opener` of every kind of model that this server has."""

    def __init__(self, options: OnnxOptions, max_queue_size: int, cache: ResponseCache | None, lookup: Lookup) -> None:
        """`cache` keeps the answers of models whose configuration asks for that; None: of no model.

        `lookup` finds the models that ensembles are made of.
        """
        self._options = options
        self._max_queue_size = max_queue_size
        self._cache = cache
        self._lookup = lookup

    async def open(self, files: ModelFiles) -> Loaded:
        check_limits(files.config)
        openings = {ENSEMBLE: self._open_ensemble, PYTHON: self._open_python}
        return await openings.get(backend_of(files.config), self._open_onnx)(files)

    async def _open_onnx(self, files: ModelFiles) -> Loaded:
        model = await open_onnx_model(files, self._options)
        statistics = Statistics()
        with _closed_on_error(model.engines):
            if model.config.HasField("sequence_batching"):
                return self._sequences(files, model.engines, model.signature, model.config, statistics)
            scheduler = self._batcher(files, model.engines, model.signature, model.config, model.loop_rows, statistics)
        return Loaded(model.signature, model.config, files.labels, scheduler, statistics)

    async def _open_python(self, files: ModelFiles) -> Loaded:
        signature = declared_signature(files.config)
        config = completed(files.config, files.model, signature, self._options.max_batch_size, ())
        engines = await asyncio.to_thread(open_python_model, files, config, signature, trusted=files.trusted)
        statistics = Statistics()
        with _closed_on_error(engines):
            if config.HasField("sequence_batching"):
                return self._sequences(files, engines, signature, config, statistics)
            decoupled = config.model_transaction_policy.decoupled
            if decoupled or not config.HasField("dynamic_batching"):
                limits = StreamLimits(self._max_queue_size)
                scheduler: Scheduler = PythonScheduler(files.title, engines, limits, statistics)
                scheduler = scheduler if decoupled else self._cached(scheduler, config, statistics)
            else:
                scheduler = self._batcher(files, engines, signature, config, 0, statistics)
        return Loaded(signature, config, files.labels, scheduler, statistics)

    async def _open_ensemble(self, files: ModelFiles) -> Loaded:
        signature = declared_signature(files.config)
        config = completed(files.config, files.model, signature, self._options.max_batch_size, ())
        statistics = Statistics()
        scheduler = EnsembleScheduler(files.title, config, signature, self._lookup, statistics)
        scheduler.check()
        cached = self._cached(scheduler, config, statistics)
        return Loaded(signature, config, files.labels, cached, statistics)

    def _sequences(
        self,
        files: ModelFiles,
        engines: Sequence[Engine],
        signature: Signature,
        config: ModelConfig,
        statistics: Statistics,
    ) -> Loaded:
        limits = SequenceLimits(self._max_queue_size, _MAX_SEQUENCES)
        states = files.folder.parent / "initial_state"
        scheduler = SequenceScheduler(files.title, engines, signature, config, limits, statistics, states)
        return Loaded(visible(signature, files.config), config, files.labels, scheduler, statistics)

    def _batcher(
        self,
        files: ModelFiles,
        engines: Sequence[Engine],
        signature: Signature,
        config: ModelConfig,
        loop_rows: int,
        statistics: Statistics,
    ) -> Scheduler:
        options = BatchOptions.of(config, self._max_queue_size)
        if options.padding is not None:
            options.padding.check(signature, options.max_batch_size)
        instances = [Instance(engine, signature, options.padding, loop_rows) for engine in engines]
        return self._cached(Batcher(files.title, instances, signature, options, statistics), config, statistics)

    def _cached(self, scheduler: Scheduler, config: ModelConfig, statistics: Statistics) -> Scheduler:
        if self._cache is None or not config.response_cache.enable:
            return scheduler
        return CachedScheduler(scheduler, self._cache, statistics)


@contextmanager
def _closed_on_error(engines: Sequence[Engine]) -> Iterator[None]:
    """Engines belong to who opened them until a scheduler has them."""
    try:
        yield
    except PenstockError:
        for engine in engines:
            engine.close()
        raise
