"""`python -m tests.benchmarks.converters [MODEL …] [--json FILE]`: rows per second of each way to run a model.

All run in one process, in turns, on two threads and the same ONNX Runtime options; the median of the rounds counts.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import numpy as np
import onnx
import onnxruntime

from penstock.converters import convert, quantize
from penstock.converters.conversion import _quiet_tensorflow
from penstock.converters.variants import Form

_quiet_tensorflow()

import keras  # noqa: E402 TensorFlow reads its settings as it is loaded
import tensorflow as tf  # noqa: E402
import tf2onnx  # noqa: E402
from keras import layers  # noqa: E402

THREADS = 2
SECONDS = 3.0
Model = Any  # Keras publishes no types


def transformer(*, causal: bool) -> Model:
    """Twelve layers, 768 wide, on 128 tokens, like BERT-base and GPT-2."""
    ids = keras.Input((128,), dtype="int32", name="ids")
    rows = layers.Embedding(30_000, 768)(ids)
    for _ in range(12):
        attended = layers.MultiHeadAttention(12, 64)(rows, rows, use_causal_mask=causal)
        rows = layers.LayerNormalization(epsilon=1e-6)(rows + attended)
        hidden = layers.Dense(3072, activation=lambda x: keras.activations.gelu(x, approximate=True))(rows)
        rows = layers.LayerNormalization(epsilon=1e-6)(rows + layers.Dense(768)(hidden))
    return keras.Model(ids, rows)


def masked_lstm() -> Model:
    ids = keras.Input((128,), dtype="int32", name="ids")
    return keras.Model(ids, layers.LSTM(128)(layers.Embedding(1000, 64, mask_zero=True)(ids)))


def plain_gru() -> Model:
    rows = keras.Input((128, 64), name="rows")
    return keras.Model(rows, layers.GRU(128)(rows))


# The model, how many rows a run has, and its variant in 8 bits; ONNX Runtime has no LSTM's like for GRU.
MODELS: dict[str, tuple[Callable[[], Model], int, Form | None]] = {
    "encoder": (lambda: transformer(causal=False), 1, "int8"),
    "decoder": (lambda: transformer(causal=True), 1, "int8"),
    "masked-lstm": (masked_lstm, 8, "int8"),
    "plain-gru": (plain_gru, 8, None),
    "efficientnet-b0": (lambda: keras.applications.EfficientNetB0(weights=None), 1, "int8-static"),
    "resnet-50": (lambda: keras.applications.ResNet50(weights=None), 1, "int8-static"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=list(MODELS), choices=MODELS, metavar="MODEL")
    parser.add_argument("--json", type=Path, help="where the numbers go")
    options = parser.parse_args()
    tf.config.threading.set_intra_op_parallelism_threads(THREADS)
    results = {name: measure(*MODELS[name]) for name in options.models}
    heads = "".join(f"{head:>12}" for head in ("TensorFlow", "tf2onnx", "penstock", "int8", "convert s"))
    print(f"{'model':<18}{heads}  rows/s; × tf2onnx, × TensorFlow, int8 × tf2onnx")
    for name, result in results.items():
        ways = tensorflow, stock, ours, int8 = [
            result.get(way) for way in ("tensorflow", "tf2onnx", "penstock", "int8")
        ]
        cells = "".join(f"{value:>12.1f}" if value else f"{'—':>12}" for value in ways)
        pairs = (ours, stock), (ours, tensorflow), (int8, stock)
        ratios = ", ".join(f"{value / other:.2f}" if value and other else "—" for value, other in pairs)
        print(f"{name:<18}{cells}{result['conversion_s']:>12.1f}  {ratios}")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def measure(build: Callable[[], Model], size: int, form: Form | None) -> dict[str, Any]:
    """Rows per second of each way, and how many seconds our conversion took. A way that there is not is left out."""
    keras.utils.set_random_seed(7)
    model = build()
    rows = _rows(model, size)
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        convert(model, Path(folder) / "model.onnx")
        seconds = perf_counter() - start
        graph = onnx.load(Path(folder) / "model.onnx")
    runs = {"penstock": _session(graph, rows)}
    if form:
        runs["int8"] = _session(quantize(graph, form, rows={graph.graph.input[0].name: rows}), rows)
    spec = tf.TensorSpec(model.inputs[0].shape, model.inputs[0].dtype, name=model.inputs[0].name)
    function = tf.function(lambda inputs: model(inputs, training=False), autograph=False).get_concrete_function(spec)
    tensor = tf.constant(rows)
    runs["tensorflow"] = lambda: function(tensor)
    try:
        stock, _ = tf2onnx.convert.from_function(
            tf.function(lambda inputs: model(inputs, training=False), autograph=False), [spec], opset=18
        )
        run = _session(stock, rows)
        run()  # of EfficientNet it makes a graph that asks for more inputs than there are
        runs["tf2onnx"] = run
    except Exception as error:
        print(f"tf2onnx cannot convert the model: {error}")
    times: dict[str, list[float]] = {way: [] for way in runs}
    for run in runs.values():
        run()
    end = perf_counter() + SECONDS * len(runs)
    while perf_counter() < end:
        for way, run in runs.items():
            start = perf_counter()
            run()
            times[way].append(perf_counter() - start)
    return {"conversion_s": seconds, **{way: size / median(measured) for way, measured in times.items()}}


def _rows(model: Model, size: int) -> Any:
    random = np.random.default_rng(7)
    shape = (size, *model.inputs[0].shape[1:])
    if model.inputs[0].dtype == "int32":
        # Padded at the end to lengths between a half and all.
        lengths = random.integers(shape[1] // 2, shape[1] + 1, (size, 1))
        return np.where(np.arange(shape[1]) < lengths, random.integers(1, 1000, shape), 0).astype(np.int32)
    return random.standard_normal(shape).astype(np.float32)


def _session(model: onnx.ModelProto, rows: Any) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    # Threads of one session that wait awake would take the cores of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: rows})


if __name__ == "__main__":
    main()
