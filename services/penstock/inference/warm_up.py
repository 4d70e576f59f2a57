"""The first runs of an engine: they show whether it can run at all, and how long a run takes."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from penstock.inference.engine import Engine, Stop
from penstock.inference.model_config import DATATYPE_NAMES
from penstock.inference.signature import BATCH, Signature, Tensor
from penstock.inference.tensors import BYTES, DATATYPES, Array, TensorError, decode_raw
from penstock.oip import model_config_pb2 as pb
from penstock.rpc.errors import PenstockError, WrongStateError

# Sizes to try for dynamic axes other than the rows: a convolution may need more than one step.
_SIZES = (1, 16, 256)

# Of several runs the fastest tells what a run costs; the others, what else the machine did. That may double a long run,
# but makes no long one of a short one twice: two are enough for a model that takes so many times the threshold.
_REPEATS = 3
_FAR_ABOVE = 10

Row = dict[str, Array]


class BatchAxisError(WrongStateError):
    """Answers do not follow the batch: the first axis is no axis of independent rows."""


def warm_up(engine: Engine, signature: Signature, stop: Stop) -> Row:
    """Runs an engine on generated rows, two and then one of them, and returns the one row that it could run.

    Raises `WrongStateError` if no size of the dynamic axes makes it run, `BatchAxisError` if answers do not follow.
    """
    failure: PenstockError | None = None
    for size in _sizes(signature):
        try:
            for rows in (2, 1) if signature.batched else (1,):
                inputs = _generated(signature, rows, size)
                _check_rows(signature, engine.run(inputs, list(signature.outputs), stop), rows)
        except WrongStateError:
            raise
        except PenstockError as error:
            failure = error
        else:
            return inputs
    raise WrongStateError(
        f"Warm-up failed: {failure} If the model cannot take generated values (ones), set warm_up to false."
    ) from failure


def declared_rows(config: pb.ModelConfig, signature: Signature, folder: Path) -> Iterator[dict[str, Array]]:
    """The inputs of the configuration's `model_warmup`. Files lie in the folder `warmup` of the model.

    Raises `WrongStateError` for a sample that does not fit the model.
    """
    for sample in config.model_warmup:
        rows = (max(1, sample.batch_size),) if signature.batched else ()
        inputs = {}
        for name, tensor in sample.inputs.items():
            if name not in signature.inputs or DATATYPE_NAMES.get(tensor.data_type) is None:
                raise WrongStateError(f"Warm-up sample {sample.name!r} names {name!r}, which is no input of the model.")
            inputs[name] = _declared(sample.name, name, tensor, rows, folder.parent / "warmup")
        for _ in range(max(1, sample.count)):
            yield inputs


def loop_rows(engine: Engine, signature: Signature, row: Row, max_rows: int, threshold_us: int, stop: Stop) -> int:
    """How many rows, doubling up to `max_rows`, the engine runs in less than the threshold; 0 if not even one."""
    fitting, rows = 0, 1
    outputs = list(signature.outputs)
    while threshold_us:
        inputs = {name: np.repeat(array, rows, axis=0) for name, array in row.items()} if rows > 1 else row
        if not _fits(engine, inputs, outputs, threshold_us * 1000, stop):
            return fitting
        fitting = rows
        if not signature.batched or rows >= max_rows:
            return fitting
        rows = min(2 * rows, max_rows)
    return 0


def _fits(engine: Engine, inputs: Row, outputs: Sequence[str], threshold_ns: int, stop: Stop) -> bool:
    repeats = _REPEATS
    while repeats > 0:
        started_ns = perf_counter_ns()
        engine.run(inputs, outputs, stop)
        taken_ns = perf_counter_ns() - started_ns
        if taken_ns < threshold_ns:
            return True
        repeats -= 1 if taken_ns < _FAR_ABOVE * threshold_ns else 2
    return False


def _sizes(signature: Signature) -> tuple[int, ...]:
    dynamic = {axis for tensor in signature.inputs.values() for axis in tensor.shape if isinstance(axis, str)}
    return _SIZES if dynamic - {BATCH} else _SIZES[:1]


def _generated(signature: Signature, rows: int, size: int) -> dict[str, Array]:
    """Ones, not zeros: a graph that divides integers by an input ends the process on a zero."""
    return {name: _ones(tensor, rows, size) for name, tensor in signature.inputs.items()}


def _ones(tensor: Tensor, rows: int, size: int) -> Array:
    shape = [axis if isinstance(axis, int) else rows if axis == BATCH else size for axis in tensor.shape]
    return np.full(shape, "1" if tensor.datatype is BYTES else 1, tensor.datatype.dtype)


def _check_rows(signature: Signature, answers: list[Array], rows: int) -> None:
    if signature.batched:
        for name, answer in zip(signature.outputs, answers, strict=True):
            if answer.shape[:1] != (rows,):
                raise BatchAxisError(
                    f"Output {name!r} does not follow the batch: expected {rows} rows; got shape {list(answer.shape)}."
                )


def _declared(sample: str, name: str, tensor: pb.ModelWarmup.Input, rows: tuple[int, ...], folder: Path) -> Array:
    datatype = DATATYPES[DATATYPE_NAMES[tensor.data_type]]
    shape = (*rows, *tensor.dims)
    if tensor.input_data_file:
        if Path(tensor.input_data_file).name != tensor.input_data_file:
            raise WrongStateError(f"Warm-up sample {sample!r}: {tensor.input_data_file[:80]!r} is no plain file name.")
        try:
            return decode_raw(datatype, shape, (folder / tensor.input_data_file).read_bytes())
        except (OSError, TensorError) as error:
            raise WrongStateError(f"Warm-up sample {sample!r}, input {name!r}: {error}.") from error
    if tensor.random_data and datatype is not BYTES:
        generator = np.random.default_rng(0)
        numbers = generator.random(shape) if datatype.dtype.kind in "fV" else generator.integers(0, 2, shape)
        return numbers.astype(datatype.dtype)
    return np.full(shape, "" if datatype is BYTES else 0, datatype.dtype)
