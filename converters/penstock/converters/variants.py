"""The forms that one graph can have, what each was measured at, and the rule by which one is chosen.

The report mirrors `penstock.api.types.v1.VariantReport` field for field.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

Form = Literal["fp16", "int8", "int8-static", "int4", "pruned"]
FORMS: tuple[Form, ...] = ("fp16", "int8", "int8-static", "int4", "pruned")
FP32 = "fp32"
"""The graph as it was converted, to which the others are compared."""

MARGIN = 1.1
"""What a variant must be faster, or smaller, than fp32 by to count as such: it costs accuracy, and two measurements of
one graph on a busy machine differ by a few percent."""


@dataclass(frozen=True)
class AccuracyBound:
    """How far a variant's answers may be from the source's before it is dropped.

    An output of classes or of probabilities that sum to 1 must have the source's class on at least the share
    `argmax_agreement` of the rows. Any other one may have a relative error, ‖variant − source‖ / ‖source‖ over all its
    elements, of at most `relative_error`.
    """

    argmax_agreement: float = 0.99
    relative_error: float = 0.05

    def __post_init__(self) -> None:
        if not 0 <= self.argmax_agreement <= 1:
            raise ValueError(f"The argmax agreement is a share, 0 to 1; it is {self.argmax_agreement}.")
        if not 0 <= self.relative_error < float("inf"):
            raise ValueError(f"The relative error must be a finite number of at least 0; it is {self.relative_error}.")


@dataclass(frozen=True)
class VariantError:
    """How far one output is from the source's on all rows together."""

    output: str
    is_classification: bool
    max_absolute_error: float
    mean_absolute_error: float
    relative_error: float
    argmax_agreement: float


@dataclass(frozen=True)
class VariantMeasurement:
    """What a variant was found to cost and gain. Latencies are medians: of one row, and of a whole batch."""

    errors: tuple[VariantError, ...]
    row_latency_us: float
    batch_latency_us: float
    size_bytes: int

    @property
    def relative_error(self) -> float:
        """The largest relative error of an output."""
        return max((error.relative_error for error in self.errors), default=0.0)

    @property
    def argmax_agreement(self) -> float:
        """The lowest agreement of an output."""
        return min((error.argmax_agreement for error in self.errors), default=1.0)

    def speed(self, reference: "VariantMeasurement") -> float:
        """How many times as fast as another it is, where it gains least: on one row or on a batch."""
        return min(reference.row_latency_us / self.row_latency_us, reference.batch_latency_us / self.batch_latency_us)


@dataclass(frozen=True)
class Variant:
    """One form of the graph. `dropped` says why it is out, and is empty if it is kept.

    `measurement` is None if the form could not be made or run.
    """

    name: str
    measurement: VariantMeasurement | None
    dropped: str = ""


@dataclass(frozen=True)
class VariantReport:
    """All variants that were tried, fp32 first, and the one that became the model."""

    variants: tuple[Variant, ...]
    chosen: str
    row_count: int
    batch_size: int
    min_argmax_agreement: float
    max_relative_error: float

    @property
    def kept(self) -> Iterator[str]:
        return (variant.name for variant in self.variants if not variant.dropped)


def judged(variants: Iterable[Variant], bound: AccuracyBound) -> tuple[Variant, ...]:
    """The variants, fp32 first, with the reason for each that is to be dropped; fp32 stays in any case.

    Out is what is less accurate than the bound, slower or larger than fp32, neither faster nor smaller, and what is not
    on the Pareto front: another one is at least as accurate, as fast and as small.
    """
    fp32, *others = variants
    if fp32.name != FP32 or fp32.measurement is None:
        raise ValueError(f"The first variant must be a measured {FP32}; it is {fp32.name}.")
    reference = fp32.measurement
    sound = [
        variant
        if variant.dropped or variant.measurement is None
        else replace(variant, dropped=_fault(variant.measurement, reference, bound))
        for variant in others
    ]
    kept = [variant for variant in sound if not variant.dropped]
    return fp32, *(
        variant if variant.dropped else replace(variant, dropped=_beaten(variant, kept)) for variant in sound
    )


def fastest(variants: Iterable[Variant]) -> str:
    """The name of the kept variant to serve: the fastest, or fp32 if none is faster by the margin.

    Fast is what is fast both on one row and on a batch. Of those that the fastest is not ahead of by the margin, the
    most accurate one is it.
    """
    fp32, *others = variants
    if fp32.measurement is None:
        raise ValueError(f"{fp32.name} was not measured.")
    kept = [(item.name, item.measurement) for item in others if item.measurement is not None and not item.dropped]
    speeds = {name: found.speed(fp32.measurement) for name, found in kept}
    needed = max(MARGIN, max(speeds.values(), default=0.0) / MARGIN)
    errors = {name: found.relative_error for name, found in kept if speeds[name] >= needed}
    return min(errors, key=errors.__getitem__, default=FP32)


def _fault(found: VariantMeasurement, reference: VariantMeasurement, bound: AccuracyBound) -> str:
    for error in found.errors:
        if error.is_classification and error.argmax_agreement < bound.argmax_agreement:
            return (
                f"too inaccurate: the class of {error.output!r} is the source's on {error.argmax_agreement:.2%} of the "
                f"rows, less than {bound.argmax_agreement:.2%}"
            )
        if not error.is_classification and error.relative_error > bound.relative_error:
            return (
                f"too inaccurate: the relative error of {error.output!r} is {error.relative_error:.2g}, more than "
                f"{bound.relative_error:g}"
            )
    speed = found.speed(reference)
    if speed * MARGIN < 1:
        return f"slower: {speed:.2f} × as fast as fp32"
    if found.size_bytes > reference.size_bytes * MARGIN:
        return f"larger: {found.size_bytes / reference.size_bytes:.2f} × the bytes of fp32"
    if speed < MARGIN and found.size_bytes * MARGIN > reference.size_bytes:
        return "no gain: neither faster nor smaller than fp32"
    return ""


def _beaten(variant: Variant, rivals: Iterable[Variant]) -> str:
    found = variant.measurement
    for rival in rivals:
        other = rival.measurement
        if found is None or other is None or rival.name == variant.name:
            continue
        # An equal one before it counts as better, else two of a kind would drop each other.
        ours = (found.relative_error, found.row_latency_us, found.batch_latency_us, found.size_bytes)
        theirs = (other.relative_error, other.row_latency_us, other.batch_latency_us, other.size_bytes)
        if ours != theirs and all(their <= our for their, our in zip(theirs, ours, strict=True)):
            return f"beaten: {rival.name} is as accurate, as fast and as small, or better"
    return ""
