"""Measures one model in every way that there is."""

import tempfile
from contextlib import ExitStack
from pathlib import Path

from tests.benchmarks.converters import graphs, ways
from tests.benchmarks.converters.models import SUBJECTS
from tests.benchmarks.harness import BenchError, compare, in_turn, step
from tests.benchmarks.report import Aim, Row

PENSTOCK, INT8, STOCK, TENSORFLOW = "Penstock", "Penstock int8", "tf2onnx", "TensorFlow"
PYTORCH = "torch.onnx, optimized"
FILES = {PENSTOCK: "penstock.onnx", INT8: "int8.onnx", STOCK: "tf2onnx.onnx", PYTORCH: "pytorch.onnx"}
ROUNDS = 15
TENSORFLOW_AIM = 1.2


def measure(name: str) -> tuple[list[Row], dict[str, str]]:
    """A row for each pair that is to be compared; and which there is not, with the reason."""
    subject = SUBJECTS[name]
    missing: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        folder = Path(temporary)
        step(f"{name}: converting")
        with ways.process() as own:
            seconds = own.submit(graphs.penstock, name, folder).result()
        for way, make in {STOCK: graphs.tf2onnx, **({PYTORCH: graphs.pytorch} if subject.pytorch else {})}.items():
            step(f"{name}: converting by {way}")
            try:
                with ways.process() as own:
                    own.submit(make, name, folder).result()
            except BenchError as error:
                missing[f"{name} beside {way}"] = str(error)
        rows = folder / "rows.npy"
        processes = {
            way: stack.enter_context(ways.process(ways.onnx_runtime, folder / file, rows))
            for way, file in FILES.items()
            if (folder / file).exists()
        }
        processes[TENSORFLOW] = stack.enter_context(ways.process(ways.tensorflow, name, rows))
        for way, process in processes.items():
            step(f"{name}: {way}, warming up")
            process.submit(ways.rate).result()
        windows = {way: lambda own=own: own.submit(ways.rate).result() for way, own in processes.items()}
        taken = in_turn(windows, ROUNDS, name)
    found = []
    for way, reference, aim in (
        (PENSTOCK, STOCK, subject.fp32_aim),
        (INT8, STOCK, subject.int8_aim),
        (PENSTOCK, PYTORCH, None),
        (PENSTOCK, TENSORFLOW, TENSORFLOW_AIM),
    ):
        if way in taken and reference in taken:
            bound = Aim("ratio", aim, True) if aim else None
            found.append(compare(name, way, "rows/s", taken, way, reference, bound))
    bound = Aim("value", subject.conversion_aim_s, False) if subject.conversion_aim_s else None
    found.append(Row(name, "conversion", "s", seconds, aim=bound))
    return found, missing
