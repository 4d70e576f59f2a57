"""The ways to run a model, each as a function that runs it once."""

import importlib.util
import logging
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import tensorflow as tf
import tf2onnx
from tests.benchmarks.converters.models import DEPTH, HEADS, HIDDEN, WIDTH, WORDS, Model
from tests.benchmarks.harness import BenchError

THREADS = 2
Run = Callable[[], Any]


def onnx_runtime(model: onnx.ModelProto | Path, rows: Any) -> Run:
    """A session with the options that all of them have."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    # Threads of one session that wait awake would take the cores of the next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    source = str(model) if isinstance(model, Path) else model.SerializeToString()
    session = onnxruntime.InferenceSession(source, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda: session.run(None, {name: rows})


def tensorflow(model: Model, rows: Any) -> Run:
    function = _function(model).get_concrete_function(_spec(model))
    tensor = tf.constant(rows)
    return lambda: function(tensor)


def tf2onnx_itself(model: Model, rows: Any) -> Run:
    """The graph that tf2onnx makes without us. Raises `BenchError` where it makes none that runs."""
    try:
        graph, _ = tf2onnx.convert.from_function(_function(model), [_spec(model)], opset=18)
        run = onnx_runtime(graph, rows)
        run()  # of EfficientNet it makes a graph that asks for more inputs than there are
    except Exception as error:
        raise BenchError(f"tf2onnx cannot convert the model: {error}") from error
    return run


def torch_onnx(rows: Any, *, causal: bool) -> Run | None:
    """The same architecture by `torch.onnx` and ONNX Runtime's transformer optimizer; None without PyTorch."""
    if importlib.util.find_spec("torch") is None or importlib.util.find_spec("onnxscript") is None:
        return None
    import torch
    from onnxruntime.transformers import optimizer

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
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exported = Path(folder) / "exported.onnx"
        program = torch.onnx.export(Transformer().eval(), (torch.tensor(rows),), dynamo=True, verbose=False)
        program.save(exported)
        kind = "gpt2" if causal else "bert"
        graph = optimizer.optimize_model(
            str(exported), model_type=kind, num_heads=HEADS, hidden_size=WIDTH, opt_level=1
        ).model
    logging.disable(logging.NOTSET)
    return onnx_runtime(graph, rows)


def _function(model: Model) -> Any:
    return tf.function(lambda inputs: model(inputs, training=False), autograph=False)


def _spec(model: Model) -> Any:
    return tf.TensorSpec(model.inputs[0].shape, model.inputs[0].dtype, name=model.inputs[0].name)
