"""The way from a trained model to an ONNX file."""

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from numpy.typing import NDArray

from penstock.converters.errors import ConversionError
from penstock.converters.foreign_files import convert_file, verify_file
from penstock.converters.limits import Limits
from penstock.converters.parity import ParityReport, Tolerance
from penstock.converters.probe import probe
from penstock.converters.signature import Signature
from penstock.converters.sources import open_source
from penstock.converters.variants import FORMS, AccuracyBound, Form
from penstock.converters.writing import write

Step = Literal["load", "trace", "convert", "verify", "variants", "write"]


@dataclass(frozen=True)
class Conversion:
    """A file that passed the gate. `sha256` is in lower-case hexadecimal.

    `data` is the file beside it that holds the weights of a model above 1.5 GB, else None; `size_bytes` counts both.
    `variant_files` are the kept variants that were asked for by name and are not the file itself.
    """

    path: Path
    signature: Signature
    parity: ParityReport
    opset: int
    ir_version: int
    size_bytes: int
    sha256: str
    data: Path | None
    variant_files: Mapping[str, Path] = field(default_factory=dict)


def convert(
    model: Any,  # noqa: ANN401 whatever a user gives
    path: str | PathLike[str],
    *,
    samples: Mapping[str, NDArray[Any]] | None = None,
    tolerance: Tolerance | None = None,
    opset: int | None = None,
    variants: Sequence[Form] = (),
    auto: bool = False,
    bound: AccuracyBound | None = None,
    on_step: Callable[[Step], None] | None = None,
    limits: Limits | None = None,
) -> Conversion:
    """Converts a model to the ONNX file `path`.

    The model is a Keras 3 model or an `onnx.ModelProto`, live or in a `.keras` or `.onnx` file; or, live only, a
    scikit-learn, XGBoost or LightGBM estimator, a `torch.nn.Module` or a `torch.export.ExportedProgram`. A subclassed
    Keras model is live, and was called once on an array, a list or a dict of floating point; all others need `samples`,
    named like the arguments of its call or like the keys of its dict. An ONNX model is checked and cleaned; its names
    stay as they are.

    A PyTorch module does not say what it takes, so its `samples` must be given: an array for each parameter of forward.
    Their first axes are the batch; which other axes are dynamic is found out by torch.export and by trying: one stays
    as the samples have it if the module takes no other size. Floats are taken in the datatype of the module's
    weights, integers are drawn from the samples. The module is in evaluation mode only while it runs.

    docs/coverage-keras.md says which layers convert, docs/coverage-scikit-learn.md which estimators.

    The file is written only after the graph has passed the gate: valid, loaded by ONNX Runtime, with the model's own
    names, order, datatypes and shapes, and answering like the model on 1, 2, 7 and 32 seeded random rows, on rows that
    are hard for it (`penstock.converters.rows`) and on `samples`, which hold an array of rows for each input by name.
    Without a `tolerance` each datatype has its own. `opset` is the version of ONNX's operators, by default the
    converter's own. An existing file is replaced at once.

    `variants` are forms of the graph to try besides (see `quantize`): measured on this machine, on the samples or else
    the random rows, and in the report with the reason for each that was dropped; the kept ones are written beside
    `path`, `model.int8.onnx`. `auto` makes the fastest kept one the file, or leaves it fp32 if none is faster; without
    `variants` all are tried and one file is written. `bound` says what is too inaccurate.

    `on_step` hears of each step as it begins. Logging and TensorFlow's graphs are global: one conversion at a time in a
    process.

    A file is converted in a process of its own that may use what `limits` say, by default `Limits()`, and cannot reach
    the network where the system can prevent it. A live model has no limits.

    Raises `UnsupportedModelError` if ONNX or the converter cannot say what the model does, `GateError` if the graph
    is not the model, `UnsafeFileError` if the file breaks a rule for untrusted files or exceeds a limit,
    `InvalidSamplesError` if the samples do not fit the inputs, and `ConversionError` if a file cannot be read or
    written.
    """
    forms = _forms(variants, auto=auto)
    target = Path(path)
    if not target.parent.is_dir():
        raise ConversionError(f"Cannot write {target}: its folder {target.parent} does not exist. Create it first.")
    if target.exists() and not target.is_file():
        raise ConversionError(f"Cannot write {target}: it is there and is not a file. Name a file.")
    options: dict[str, Any] = {
        "tolerance": tolerance,
        "opset": opset,
        "forms": forms,
        "keeps_all": bool(variants),
        "auto": auto,
        "bound": bound,
    }
    if isinstance(model, str | PathLike):
        return convert_file(Path(model), target, samples=samples, on_step=on_step, limits=limits, **options)
    return convert_here(model, target, samples=samples, on_step=on_step, **options)


def convert_here(
    model: Any,  # noqa: ANN401 whatever a user gives
    path: Path,
    *,
    samples: Mapping[str, NDArray[Any]] | None = None,
    tolerance: Tolerance | None = None,
    opset: int | None = None,
    forms: Sequence[Form] = (),
    keeps_all: bool = False,
    auto: bool = False,
    bound: AccuracyBound | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Conversion:
    """`convert` in this process, of files too. `keeps_all` writes the kept forms beside the file."""
    announce = on_step or _silently
    announce("load")
    _quiet_tensorflow()
    with closing(open_source(model, samples)) as source:
        # Not before a file was found harmless: that takes less time than these.
        from penstock.converters import gate  # noqa: PLC0415 loads ONNX Runtime
        from penstock.converters.fusion import optimize  # noqa: PLC0415 loads ONNX
        from penstock.converters.opset import opset_of, with_opset  # noqa: PLC0415 loads ONNX

        announce("trace")
        asked = probe(source, samples)
        announce("convert")
        graph = optimize(with_opset(source.to_onnx(asked.signature), opset))
        announce("verify")
        parity = gate.verify(graph, asked, tolerance, source.description)
    files: dict[str, Path] = {}
    if forms:
        announce("variants")
        from penstock.converters import variant_trial as trial  # noqa: PLC0415 only where asked for

        with tempfile.TemporaryDirectory(prefix="penstock-variants-") as folder:
            report = trial.try_variants(graph, asked, forms, bound or AccuracyBound(), Path(folder), auto=auto)
            graph = trial.load_variant(Path(folder), report.chosen)
            files = trial.write_variants(Path(folder), report, path) if keeps_all else {}
        parity = replace(parity, variants=report)
    announce("write")
    written = write(path, graph)
    return Conversion(
        path=path,
        signature=asked.signature,
        parity=parity,
        opset=opset_of(graph),
        ir_version=graph.ir_version,
        size_bytes=written.size_bytes,
        sha256=written.sha256,
        data=written.data,
        variant_files=files,
    )


def verify(
    model: Any,  # noqa: ANN401 ONNX publishes no types
    source: Any,  # noqa: ANN401 whatever a user gives
    *,
    samples: Mapping[str, NDArray[Any]] | None = None,
    tolerance: Tolerance | None = None,
    limits: Limits | None = None,
) -> ParityReport:
    """Lets an ONNX model, live or the path of a file, through the gate that `convert` has for the model `source`.

    It must have the names, datatypes and shapes that `convert` gives. A source's file is read in a process of its own,
    as `convert` does. Raises what `convert` raises.
    """
    if isinstance(source, str | PathLike):
        return verify_file(model, Path(source), samples=samples, tolerance=tolerance, limits=limits)
    return verify_here(model, source, samples=samples, tolerance=tolerance)


def verify_here(
    model: Any,  # noqa: ANN401 ONNX publishes no types
    source: Any,  # noqa: ANN401 whatever a user gives
    *,
    samples: Mapping[str, NDArray[Any]] | None = None,
    tolerance: Tolerance | None = None,
) -> ParityReport:
    """`verify` in this process, of files too."""
    _quiet_tensorflow()
    from penstock.converters import gate, onnx_file  # noqa: PLC0415 loads ONNX Runtime

    graph = onnx_file.read(Path(model)) if isinstance(model, str | PathLike) else model
    with closing(open_source(source, samples)) as opened:
        return gate.verify(graph, probe(opened, samples), tolerance, opened.description)


def _forms(asked: Sequence[Form], *, auto: bool) -> Sequence[Form]:
    """The forms to try, each once."""
    if isinstance(asked, str):
        raise ConversionError(f"Variants are a list of names; got the text {asked!r}.")
    if unknown := [form for form in asked if form not in FORMS]:
        raise ConversionError(f"There is no variant {unknown[0]!r}. Variants are {', '.join(FORMS)}.")
    return tuple(dict.fromkeys(asked)) or (FORMS if auto else ())


def _silently(_: Step) -> None:
    pass


def _quiet_tensorflow() -> None:
    """TensorFlow reads these once, when it is loaded; whoever set them, or loaded it before, has decided otherwise."""
    if "tensorflow" not in sys.modules:
        os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
        # Announced before the log level is known; and its other rounding would only blur the comparison.
        os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
