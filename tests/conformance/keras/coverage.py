"""The table of coverage as a document. What it says of each case is what the tests prove of it."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import keras
from tests.conformance.keras import (
    activations,
    attention,
    convolutions,
    core,
    datatypes,
    dynamic,
    ops,
    pooling,
    preprocessing,
    recurrent,
    subclassed,
)
from tests.conformance.keras.case import Case

DOCUMENT = Path(__file__).parents[3] / "docs" / "coverage-keras.md"

LAYER_GROUPS = {
    "Core layers": core.CASES,
    "Convolutions": convolutions.CASES,
    "Pooling": pooling.CASES,
    "Recurrent layers": recurrent.CASES,
    "Attention": attention.CASES,
    "Preprocessing": preprocessing.CASES,
}
GROUPS = {
    **LAYER_GROUPS,
    "Activations": activations.CASES,
    "keras.ops": ops.CASES,
    "Datatypes": datatypes.CASES,
    "Images and series of any size": dynamic.CASES,
    "Models without inputs of their own": subclassed.CASES,
}

WITHOUT_A_CASE = {
    "Equalization": "Keras 3.15 cannot put it into a Functional model: it gives its input back as its output.",
    "FlaxLayer": "Runs code of JAX.",
    "InputLayer": "Is in every model of this table.",
    "InputSpec": "Is no layer.",
    "JaxLayer": "Runs code of JAX.",
    "Layer": "Is the base class of layers.",
    "MaxNumBoundingBoxes": "Takes labels, which there are in training only.",
    "TFSMLayer": "Runs code from a file, and is refused.",
    "TorchModuleWrapper": "Runs code of PyTorch.",
    "Wrapper": "Is the base class of wrappers.",
}
"""The public classes of keras.layers that no case is about, and why."""

_HEAD = """# Which parts of Keras convert

Each row is a small model that the tests in [tests/conformance/keras](../tests/conformance/keras) convert and pass
through the gate, or that is refused with an error which names the layer. `make coverage` writes this file.

A live model may hold a `Lambda`; a file with one is refused, since it would run code of the file.
"""


def document() -> str:
    return "\n".join(_lines())


def classes_of(cases: Sequence[Case]) -> set[str]:
    """What the cases are about; a variant stands in parentheses behind it."""
    return {case.name.split(" ")[0] for case in cases}


def public_layers() -> set[str]:
    """By their own names: AvgPool1D is AveragePooling1D."""
    classes = {name: value for name, value in vars(keras.layers).items() if isinstance(value, type)}
    return {value.__name__ if value.__name__ in classes else name for name, value in classes.items()}


def _lines() -> Iterator[str]:
    yield _HEAD
    for title, cases in GROUPS.items():
        converted = [case for case in cases if not case.refused]
        yield f"## {title}: {len(converted)} of {len(cases)}\n"
        yield "| what | variants | converts |"
        yield "|---|---|---|"
        for name, group in groupby(sorted(cases, key=_row), key=_row):
            variants = list(group)
            named = ", ".join(_variant(case) for case in variants if _variant(case))
            refused = variants[0].refused
            yield f"| `{name[0]}` | {named} | {f'no: {variants[0].reason}' if refused else 'yes'} |"
        yield ""
    yield "## Layers without a row\n"
    yield "| what | why |"
    yield "|---|---|"
    for name, why in WITHOUT_A_CASE.items():
        yield f"| `{name}` | {why} |"
    yield ""


def _row(case: Case) -> tuple[str, str]:
    return case.name.partition(" (")[0], case.reason if case.refused else ""


def _variant(case: Case) -> str:
    return case.name.partition(" (")[2].removesuffix(")")
