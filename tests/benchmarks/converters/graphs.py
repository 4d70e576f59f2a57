"""Makes the graphs that are measured, each in a process of its own: tf2onnx never gives back what it took."""

import importlib.util
import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import onnx
from tests.benchmarks.converters.models import DEPTH, HEADS, HIDDEN, SUBJECTS, WIDTH, WORDS, built, rows_for
from tests.benchmarks.harness import BenchError

from penstock.converters import convert, quantize

Model = Any  # Keras publishes no types


def penstock(name: str, folder: Path) -> float:
    """Writes our graph, its variant in 8 bits and the rows of a run; returns the seconds of our conversion."""
    model, subject = built(name), SUBJECTS[name]
    rows = rows_for(model, subject.rows)
    np.save(folder / "rows.npy", rows)
    start = perf_counter()
    convert(model, folder / "penstock.onnx")
    seconds = perf_counter() - start
    if subject.int8:
        graph = onnx.load(folder / "penstock.onnx")
        onnx.save(quantize(graph, subject.int8, rows={graph.graph.input[0].name: rows}), folder / "int8.onnx")
    return seconds


def tf2onnx(name: str, folder: Path) -> None:
    """Writes the graph that tf2onnx makes without us. Raises `BenchError` where it makes none that runs."""
    import tensorflow as tf
    from onnxruntime import InferenceSession
    from tf2onnx import convert as stock

    model = built(name)
    path = folder / "tf2onnx.onnx"
    spec = tf.TensorSpec(model.inputs[0].shape, model.inputs[0].dtype, name=model.inputs[0].name)
    try:
        stock.from_function(inference(model), [spec], opset=18, output_path=str(path))
        session = InferenceSession(path, providers=["CPUExecutionProvider"])
        # Of EfficientNet it makes a graph that asks for more inputs than there are.
        session.run(None, {model.inputs[0].name: np.load(folder / "rows.npy")})
    except Exception as error:
        path.unlink(missing_ok=True)
        raise BenchError(f"tf2onnx cannot convert the model: {error}") from error


def pytorch(name: str, folder: Path) -> None:
    """Writes the same architecture by `torch.onnx` and ONNX Runtime's optimizer of transformers.

    Raises `BenchError` without PyTorch.
    """
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("onnxscript") is None:
        raise BenchError("PyTorch and onnxscript are not installed.")
    import torch
    from onnxruntime.transformers import optimizer

    causal = SUBJECTS[name].pytorch == "causal"

    class Transformer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layer = torch.nn.TransformerEncoderLayer(WIDTH, HEADS, HIDDEN, 0.0, torch.nn.GELU("tanh"), batch_first=True)
            self.embedding = torch.nn.Embedding(WORDS, WIDTH)
            self.layers = torch.nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)

        def forward(self, ids: Any) -> Any:
            mask = torch.nn.Transformer.generate_square_subsequent_mask(ids.shape[1]) if causal else None
            return self.layers(self.embedding(ids), mask=mask, is_causal=causal)

    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    exported = folder / "exported.onnx"
    rows = torch.tensor(np.load(folder / "rows.npy"))
    torch.onnx.export(Transformer().eval(), (rows,), dynamo=True, verbose=False).save(exported)
    kind = "gpt2" if causal else "bert"
    optimized = optimizer.optimize_model(
        str(exported), model_type=kind, num_heads=HEADS, hidden_size=WIDTH, opt_level=1
    )
    onnx.save(optimized.model, folder / "pytorch.onnx")


def inference(model: Model) -> Callable[[Any], Any]:
    """The model as TensorFlow's graph."""
    import tensorflow as tf

    return tf.function(lambda inputs: model(inputs, training=False), autograph=False)  # type: ignore[no-any-return]
