"""Opens an ONNX model: its instances, its signature, its complete configuration, and what its warm-up shows."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import structlog

from penstock.inference.model_config import check_graph, completed, instance_count, signature_of
from penstock.inference.onnx_engine import OnnxEngine, OnnxStop, SessionPlan, available_providers
from penstock.inference.onnx_file import check_external_data, operators
from penstock.inference.opening import ModelFiles
from penstock.inference.sequence_config import hidden_inputs, hidden_outputs, visible
from penstock.inference.signature import Signature
from penstock.inference.threads import threads_per_instance
from penstock.inference.warm_up import BatchAxisError, Row, declared_rows, loop_rows, warm_up
from penstock.oip.model_config_pb2 import ModelConfig, ModelInstanceGroup
from penstock.rpc.errors import PenstockError, WrongStateError

_log = structlog.get_logger("penstock.inference.onnx_model")

# Operators that end the process where an input is empty, in ONNX Runtime 1.32.
_NEED_ELEMENTS = {"LSTM", "GRU", "DynamicQuantizeLSTM", "Attention", "MultiHeadAttention", "GroupQueryAttention"}


@dataclass(frozen=True)
class OnnxOptions:
    """What the server allows every ONNX model, where its configuration says nothing else."""

    max_batch_size: int
    intra_op_threads: int
    warm_up: bool
    # A run that takes less is made on the event loop; 0: none is.
    inline_threshold_us: int
    # Names like `cuda` and `cpu`, in order of preference.
    execution_providers: tuple[str, ...]


@dataclass(frozen=True)
class OnnxModel:
    """An ONNX model in memory: an engine for each instance. `loop_rows` rows may run on the event loop."""

    engines: Sequence[OnnxEngine]
    signature: Signature
    config: ModelConfig
    loop_rows: int


async def open_onnx_model(files: ModelFiles, options: OnnxOptions) -> OnnxModel:
    """Raises `WrongStateError` where graph, configuration and signature do not agree or the model cannot run.

    Cancelled, it ends the run that warms up, and returns when nothing of the model is open.
    """
    opening = _Opening(files, options)
    work = asyncio.create_task(asyncio.to_thread(opening.model))
    try:
        await asyncio.wait([work])
    except asyncio.CancelledError:
        opening.give_up()
        await asyncio.wait([work])
        # How it ended interests nobody any more.
        work.exception()
        raise
    return work.result()


class _Opening:
    def __init__(self, files: ModelFiles, options: OnnxOptions) -> None:
        self._files = files
        self._options = options
        self._hidden = hidden_inputs(files.config) | hidden_outputs(files.config)
        self._stop = OnnxStop()

    def give_up(self) -> None:
        """Makes `model` raise soon. May be called from any thread."""
        self._stop.stop()

    def model(self) -> OnnxModel:
        config = self._files.config
        path = self._files.path()
        check_external_data(path)
        instances = instance_count(config)
        plan = SessionPlan(
            threads=threads_per_instance(self._options.intra_op_threads, instances),
            providers=self._providers(),
            needs_elements=not _NEED_ELEMENTS.isdisjoint(operators(path)),
        )
        first = self._engine(path, plan)
        engines = [first]
        try:
            signature, proof = self._signature(first)
            shown = visible(signature, config) if config.HasField("sequence_batching") else signature
            complete = completed(config, self._files.model, shown, self._options.max_batch_size, first.providers)
            first.serve(signature)
            rows = self._warmed_up(first, complete, signature, proof)
            if instances > 1:
                # Instances run side by side, which the one loop cannot.
                rows = 0
            elif rows and plan.threads > 1:
                # What runs on the loop must not wait for other threads to wake up.
                engines[0] = alone = self._engine(path, replace(plan, threads=1))
                first.close()
                alone.serve(signature)
                rows = self._warmed_up(alone, complete, signature)
            for _ in range(instances - 1):
                engines.append(self._engine(path, plan))
                engines[-1].serve(signature)
        except PenstockError:
            for engine in engines:
                engine.close()
            raise
        return OnnxModel(engines, signature, complete, rows)

    def _engine(self, path: Path, plan: SessionPlan) -> OnnxEngine:
        if self._stop.stopped:
            raise WrongStateError(f"{self._files.title} was given up while it loaded.")
        return OnnxEngine(path, plan)

    def _signature(self, engine: OnnxEngine) -> tuple[Signature, Row | None]:
        """The registry's signature, or the graph's own; a batch axis that was only guessed has to prove itself.

        Beside it the row that proved it, with which the engine is warm.
        """
        files = self._files
        if files.signature is not None:
            check_graph(files.signature, engine.inputs, engine.outputs)
            return files.signature, None
        signature = signature_of(files.config, engine.inputs, engine.outputs, self._hidden)
        if signature.batched and not files.config.max_batch_size and self._options.warm_up:
            engine.serve(signature)
            try:
                return signature, warm_up(engine, signature, self._stop)
            except BatchAxisError as error:
                _log.info("the first axis is no batch", model=files.model, version=files.number, reason=error.message)
                signature = signature_of(_unbatched(files.config, engine), engine.inputs, engine.outputs, self._hidden)
        return signature, None

    def _warmed_up(
        self, engine: OnnxEngine, config: ModelConfig, signature: Signature, proof: Row | None = None
    ) -> int:
        """How many rows may run on the event loop, as the warm-up's runs show. `proof`: a row that it is warm with."""
        declared: Row | None = None
        for declared in declared_rows(config, signature, self._files.folder):
            engine.run(declared, list(signature.outputs), self._stop)
        if not self._options.warm_up:
            return 0
        fresh = declared if declared is not None and not signature.batched else proof
        row = fresh or warm_up(engine, signature, self._stop)
        rows = loop_rows(engine, signature, row, config.max_batch_size, self._options.inline_threshold_us, self._stop)
        _log.debug("warmed up", model=self._files.model, version=self._files.number, loop_rows=rows)
        return rows

    def _providers(self) -> tuple[str, ...]:
        config = self._files.config
        preferred = self._options.execution_providers
        kinds = {group.kind for group in config.instance_group}
        if kinds and kinds <= {ModelInstanceGroup.KIND_CPU}:
            preferred = tuple(name for name in preferred if name in ("openvino", "cpu"))
        accelerators = config.optimization.execution_accelerators
        asked = [one.name for one in (*accelerators.gpu_execution_accelerator, *accelerators.cpu_execution_accelerator)]
        return available_providers((*asked, *preferred))


def _unbatched(config: ModelConfig, engine: OnnxEngine) -> ModelConfig:
    """The configuration with the graph's own dims written out, which say that no axis is a batch."""
    written = ModelConfig()
    written.CopyFrom(config)
    for tensor in engine.inputs:
        written.input.add(name=tensor.name, dims=_dims(tensor.axes))
    for tensor in engine.outputs:
        written.output.add(name=tensor.name, dims=_dims(tensor.axes))
    return written


def _dims(axes: Sequence[int | str | None]) -> list[int]:
    return [axis if isinstance(axis, int) else -1 for axis in axes]
