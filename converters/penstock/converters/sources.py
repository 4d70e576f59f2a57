"""Which source a model is: a small table from what a user gives to what a conversion asks."""

from collections.abc import Callable
from importlib.util import find_spec
from os import PathLike
from pathlib import Path
from typing import Any

from penstock.converters.errors import ConversionError, UnsafeFileError, UnsupportedModelError
from penstock.converters.parity import Tensors
from penstock.converters.source import Source


def open_source(model: Any, samples: Tensors | None = None) -> Source:  # noqa: ANN401 whatever a user gives
    """A live model, or a file by its suffix. Raises `ConversionError` and what `convert` says.

    `samples` are for live models that do not say themselves what they take.
    """
    if isinstance(model, str | PathLike):
        path = Path(model)
        return _FILES.get(path.suffix.lower(), _keras_file)(path)
    for kind in type(model).__mro__:
        if opener := _LIVE.get(kind.__module__.partition(".")[0]):
            return opener(model, samples)
    raise UnsupportedModelError(
        f"Expected a Keras 3 or ONNX model, a PyTorch module, a scikit-learn estimator, or the path of a .keras or "
        f".onnx file, got {type(model).__qualname__}."
    )


def _keras_file(path: Path) -> Source:
    from penstock.converters.keras_archive import check_archive  # noqa: PLC0415 only for such a file

    try:
        check_archive(path)
    except OSError as error:
        raise ConversionError(f"Cannot read the model {path}: {error.strerror}.") from error
    from penstock.converters import keras_source  # noqa: PLC0415 seconds of TensorFlow

    return _keras(keras_source.load(path))


def _keras(model: Any, samples: Tensors | None = None) -> Source:  # noqa: ANN401 Keras publishes no types
    from penstock.converters.keras_model import KerasModel  # noqa: PLC0415 seconds of TensorFlow

    return KerasModel(model, samples)


def _onnx_file(path: Path) -> Source:
    from penstock.converters import onnx_file  # noqa: PLC0415 only for such a file

    return _onnx(onnx_file.read(path))


def _onnx(model: Any, _: Tensors | None = None) -> Source:  # noqa: ANN401 ONNX publishes no types
    from penstock.converters.onnx_source import OnnxSource  # noqa: PLC0415 loads ONNX Runtime

    return OnnxSource(model)


def _sklearn(model: Any, _: Tensors | None = None) -> Source:  # noqa: ANN401 scikit-learn publishes no types
    from penstock.converters.sklearn_source import SklearnSource  # noqa: PLC0415 loads scikit-learn

    return SklearnSource(model)


def _booster(model: Any, _: Tensors | None = None) -> Source:  # noqa: ANN401 such models publish no types
    from penstock.converters.sklearn_boosters import estimator_of  # noqa: PLC0415 only for such a model

    return _sklearn(estimator_of(model))


def _pytorch(model: Any, samples: Tensors | None) -> Source:  # noqa: ANN401 torch need not be there
    if not find_spec("onnxscript"):
        raise UnsupportedModelError("torch exports to ONNX with onnxscript: pip install 'penstock[pytorch]'.")
    import torch  # noqa: PLC0415 seconds

    from penstock.converters.pytorch_source import open_module, open_program  # noqa: PLC0415 loads torch

    if isinstance(model, torch.nn.Module):
        return open_module(model, samples)
    if isinstance(model, torch.export.ExportedProgram):
        return open_program(model)
    raise UnsupportedModelError(
        f"Of PyTorch, a torch.nn.Module or a torch.export.ExportedProgram converts, not a {type(model).__qualname__}."
    )


def _pytorch_file(path: Path) -> Source:
    raise UnsafeFileError(
        "no-pickle",
        f"{path} is a file of PyTorch, which is or may hold a pickle, and loading one runs the code in it. Load it "
        "where it was trained and convert the live module in Python, penstock.converters.convert(module, path, "
        "samples=...), or export it there with torch.onnx.export and give the .onnx.",
    )


def _safetensors_file(path: Path) -> Source:
    raise UnsupportedModelError(
        f"{path} holds weights alone, not what is computed with them. Load them into their module and convert that in "
        "Python: penstock.converters.convert(module, path, samples=...)."
    )


_FILES: dict[str, Callable[[Path], Source]] = {
    ".keras": _keras_file,
    ".onnx": _onnx_file,
    ".safetensors": _safetensors_file,
    **dict.fromkeys((".bin", ".ckpt", ".pt", ".pt2", ".pth"), _pytorch_file),
}

# By the first package that a class of the model, or of what it derives from, is defined in.
_LIVE: dict[str, Callable[[Any, Tensors | None], Source]] = {
    "keras": _keras,
    "lightgbm": _booster,
    "onnx": _onnx,
    "sklearn": _sklearn,
    "torch": _pytorch,
    "xgboost": _booster,
}
