"""How far a converted model's answers are from its source's.

The report mirrors `penstock.api.types.v1.ParityReport` field for field.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from penstock.converters.errors import GateError

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Tolerance:
    """An element passes if |converted − source| <= absolute + relative × |source|. The defaults fit float32."""

    absolute: float = 1e-5
    relative: float = 1e-4

    def __post_init__(self) -> None:
        for name, value in (("absolute", self.absolute), ("relative", self.relative)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"The {name} tolerance must be a finite number of at least 0; it is {value}.")


@dataclass(frozen=True)
class Batch:
    """Rows, where they came from, and what the source model answers to them."""

    rows: Literal["random", "sample"]
    size: int
    inputs: Tensors
    answers: Tensors


@dataclass(frozen=True)
class ParityCase:
    """One output of one batch that both models answered."""

    output: str
    rows: str
    batch_size: int
    max_absolute_error: float
    max_relative_error: float
    argmax_agreement: float


@dataclass(frozen=True)
class ParityReport:
    """Every comparison that was made; all lie within the tolerances."""

    cases: tuple[ParityCase, ...]
    max_absolute_error: float
    max_relative_error: float
    absolute_tolerance: float
    relative_tolerance: float
    source: str
    runtime: str

    @classmethod
    def of(cls, cases: Sequence[ParityCase], tolerance: Tolerance, source: str, runtime: str) -> "ParityReport":
        return cls(
            cases=tuple(cases),
            max_absolute_error=max(case.max_absolute_error for case in cases),
            max_relative_error=max(case.max_relative_error for case in cases),
            absolute_tolerance=tolerance.absolute,
            relative_tolerance=tolerance.relative,
            source=source,
            runtime=runtime,
        )


def compare(batch: Batch, output: str, converted: NDArray[Any], tolerance: Tolerance) -> ParityCase:
    """Compares one output of a batch with the source's answer.

    NaN equals NaN only, an infinity equals itself only. Raises `GateError` on another shape or datatype, or if an
    element lies outside the tolerance.
    """
    expected = batch.answers[output]
    if converted.shape != expected.shape or converted.dtype != expected.dtype:
        raise GateError(
            f"Output {output!r} on {batch.size} {batch.rows} rows: the source gives {expected.dtype} "
            f"{list(expected.shape)}, the "
            f"converted model {converted.dtype} {list(converted.shape)}. Nothing was written; report it with the "
            "model.",
            output=output,
        )
    ours, theirs = converted.astype(np.float64), expected.astype(np.float64)
    error = _absolute_error(ours, theirs)
    allowed = tolerance.absolute + tolerance.relative * np.abs(theirs)
    # Not `error > allowed`: a NaN error must fail, and an infinite source must not allow everything.
    failed = ~(error <= np.where(np.isfinite(theirs), allowed, 0.0))
    if failed.any():
        raise _difference(batch, output, ours=ours, theirs=theirs, error=error, failed=failed)
    counted = np.isfinite(theirs) & (np.abs(theirs) >= max(tolerance.absolute, np.finfo(np.float64).tiny))
    relative = error[counted] / np.abs(theirs[counted])
    return ParityCase(
        output=output,
        rows=batch.rows,
        batch_size=batch.size,
        max_absolute_error=float(error.max(initial=0.0)),
        max_relative_error=float(relative.max(initial=0.0)),
        argmax_agreement=_argmax_agreement(ours, theirs),
    )


def _absolute_error(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):  # inf − inf is NaN, and `same` has spoken already
        return np.where(same, 0.0, np.abs(ours - theirs))


def _difference(
    batch: Batch,
    output: str,
    *,
    ours: NDArray[np.float64],
    theirs: NDArray[np.float64],
    error: NDArray[np.float64],
    failed: NDArray[np.bool_],
) -> GateError:
    severity = np.where(failed, np.nan_to_num(error, nan=np.inf), -1.0)
    worst = np.unravel_index(int(np.argmax(severity)), error.shape)
    row = int(worst[0]) if worst else 0
    place = f"row {row}" + (f", element {[int(index) for index in worst[1:]]}" if len(worst) > 1 else "")
    return GateError(
        f"Output {output!r} differs from the source on {batch.size} {batch.rows} rows: in {place}, expected "
        f"{theirs[worst]:.9g}, got {ours[worst]:.9g}, a difference of {error[worst]:.3g}; {int(failed.sum())} of "
        f"{failed.size} "
        "elements are outside the tolerance. Nothing was written. If that is acceptable, give larger tolerances.",
        output=output,
        row=row,
        difference=float(error[worst]),
    )


def _argmax_agreement(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    if ours.ndim < 2 or not ours.size:
        return 1.0
    return float(np.mean(ours.argmax(axis=-1) == theirs.argmax(axis=-1)))
