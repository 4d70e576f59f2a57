"""How far a converted model's answers are from its source's.

The report mirrors `penstock.api.types.v1.ParityReport` field for field.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from penstock.converters.errors import GateError
from penstock.converters.variants import VariantReport

Tensors = Mapping[str, NDArray[Any]]


@dataclass(frozen=True)
class Tolerance:
    """An element passes if |converted − source| <= absolute × scale + relative × |source|. The defaults fit float32.

    The scale is the largest magnitude in the element's row of the output, and at least 1: what is small beside others
    was summed up from numbers of their size.
    """

    absolute: float = 1e-5
    relative: float = 1e-4

    def __post_init__(self) -> None:
        for name, value in (("absolute", self.absolute), ("relative", self.relative)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"The {name} tolerance must be a finite number of at least 0; it is {value}.")


EXACT = Tolerance(0.0, 0.0)
_BY_DTYPE = {"float16": Tolerance(1e-2, 1e-2), "float32": Tolerance(), "float64": Tolerance()}


def tolerance_of(dtype: np.dtype[Any], given: Tolerance | None) -> Tolerance:
    """What an element of this type may differ by: `given` or the type's own; classes and texts are equal or wrong."""
    own = _BY_DTYPE.get(dtype.name, EXACT)
    return own if given is None or own is EXACT else given


@dataclass(frozen=True)
class Batch:
    """Rows, what they are called (`random`, `sample`, `extreme`, …), and what the source model answers to them.

    `slack` is what an element may differ by besides the tolerance, where the rows themselves make answers uncertain.
    Elements that are True in `unasked` are not compared.
    """

    rows: str
    size: int
    inputs: Tensors
    answers: Tensors
    slack: Tensors = field(default_factory=dict)
    unasked: Tensors = field(default_factory=dict)


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
class DatatypeTolerance:
    """What elements of one datatype could differ by."""

    datatype: str
    absolute: float
    relative: float


@dataclass(frozen=True)
class SkippedRows:
    """A kind of rows that was left out, and why: mostly, because the source itself fails on them."""

    rows: str
    reason: str


@dataclass(frozen=True)
class ParityReport:
    """Every comparison that was made; all lie within the tolerances.

    `absolute_tolerance` and `relative_tolerance` are the largest of `tolerances`. `warnings` are ONNX Runtime's about
    the graph; those that mean a wrong graph let none pass. `variants` has the forms of the graph that were tried, if
    any were: the cases are those of fp32, whichever was chosen.
    """

    cases: tuple[ParityCase, ...]
    max_absolute_error: float
    max_relative_error: float
    absolute_tolerance: float
    relative_tolerance: float
    source: str
    runtime: str
    argmax_agreement: float
    row_count: int
    tolerances: tuple[DatatypeTolerance, ...]
    skipped: tuple[SkippedRows, ...]
    warnings: tuple[str, ...]
    variants: VariantReport | None = None

    @classmethod
    def of(
        cls,
        cases: Sequence[ParityCase],
        tolerances: Mapping[str, Tolerance],
        *,
        source: str,
        runtime: str,
        skipped: Sequence[SkippedRows] = (),
        warnings: Sequence[str] = (),
    ) -> "ParityReport":
        """The report of these cases; `tolerances` are by datatype."""
        sizes = np.asarray([case.batch_size for case in cases], np.float64)
        agreement = np.asarray([case.argmax_agreement for case in cases])
        return cls(
            cases=tuple(cases),
            max_absolute_error=max(case.max_absolute_error for case in cases),
            max_relative_error=max(case.max_relative_error for case in cases),
            absolute_tolerance=max(tolerance.absolute for tolerance in tolerances.values()),
            relative_tolerance=max(tolerance.relative for tolerance in tolerances.values()),
            source=source,
            runtime=runtime,
            argmax_agreement=float(np.average(agreement, weights=sizes)) if sizes.any() else 1.0,
            row_count=sum(case.batch_size for case in cases if case.output == cases[0].output),
            tolerances=tuple(
                DatatypeTolerance(datatype, tolerance.absolute, tolerance.relative)
                for datatype, tolerance in sorted(tolerances.items())
            ),
            skipped=tuple(skipped),
            warnings=tuple(warnings),
        )


def compare(batch: Batch, output: str, converted: NDArray[Any], given: Tolerance | None) -> ParityCase:
    """Compares one output of a batch with the source's answer, within `given` or the datatype's own tolerance.

    NaN equals NaN only, an infinity equals itself only. Raises `GateError` on another shape or datatype, or if an
    element lies outside the tolerance.
    """
    expected = batch.answers[output]
    if converted.shape != expected.shape or converted.dtype != expected.dtype:
        raise GateError(
            f"Output {output!r} on {batch.size} {batch.rows} rows: the source gives {expected.dtype} "
            f"{list(expected.shape)}, the converted model {converted.dtype} {list(converted.shape)}. Nothing was "
            "written; report it with the model.",
            output=output,
        )
    tolerance = tolerance_of(expected.dtype, given)
    if expected.dtype == object:
        return _compare_texts(batch, output, converted, expected)
    ours, theirs = converted.astype(np.float64), expected.astype(np.float64)
    error = _absolute_error(ours, theirs)
    asked = ~batch.unasked.get(output, np.zeros(theirs.shape, np.bool_))
    error = np.where(asked, error, 0.0)
    allowed = tolerance.absolute * _scale(theirs) + tolerance.relative * np.abs(theirs) + batch.slack.get(output, 0.0)
    # Not `error > allowed`: a NaN error must fail, and an infinite source must not allow everything.
    failed = ~(error <= np.where(np.isfinite(theirs), allowed, 0.0))
    if failed.any():
        raise _difference(batch, output, ours=ours, theirs=theirs, error=error, failed=failed)
    counted = asked & np.isfinite(theirs) & (np.abs(theirs) >= max(tolerance.absolute, np.finfo(np.float64).tiny))
    relative = error[counted] / np.abs(theirs[counted])
    return ParityCase(
        output=output,
        rows=batch.rows,
        batch_size=batch.size,
        max_absolute_error=float(error.max(initial=0.0)),
        max_relative_error=float(relative.max(initial=0.0)),
        argmax_agreement=_argmax_agreement(ours, theirs),
    )


def _scale(theirs: NDArray[np.float64]) -> NDArray[np.float64]:
    """The largest magnitude of each row, at least 1, in a shape that goes with all elements."""
    magnitudes = np.where(np.isfinite(theirs), np.abs(theirs), 0.0)
    scale: NDArray[np.float64] = magnitudes.max(axis=tuple(range(1, theirs.ndim)), keepdims=True, initial=1.0)
    return scale


def _compare_texts(batch: Batch, output: str, ours: NDArray[Any], theirs: NDArray[Any]) -> ParityCase:
    differing = np.argwhere((ours != theirs) & ~batch.unasked.get(output, np.zeros(theirs.shape, np.bool_)))
    if len(differing):
        worst = tuple(differing[0])
        raise GateError(
            f"Output {output!r} differs from the source on {batch.size} {batch.rows} rows: in row {worst[0]}, "
            f"expected {theirs[worst]!r}, got {ours[worst]!r}; {len(differing)} of {ours.size} elements differ. "
            "Nothing was written.",
            output=output,
            row=int(worst[0]),
        )
    return ParityCase(output, batch.rows, batch.size, 0.0, 0.0, 1.0)


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
        f"{failed.size} elements are outside the tolerance. Nothing was written. If that is acceptable, give larger "
        "tolerances.",
        output=output,
        row=row,
        difference=float(error[worst]),
    )


def _argmax_agreement(ours: NDArray[np.float64], theirs: NDArray[np.float64]) -> float:
    if ours.ndim < 2 or not ours.size:
        return 1.0
    return float(np.mean(ours.argmax(axis=-1) == theirs.argmax(axis=-1)))
