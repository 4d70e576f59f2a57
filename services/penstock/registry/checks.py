"""What the contract asks of the fields of a request."""

import math
import re
from collections.abc import Iterable

from penstock.api.registry.v1.deployment_service_pb2 import Deployment, DeploymentTarget
from penstock.api.registry.v1.model_pb2 import Provenance, Version
from penstock.api.types.v1.parity_pb2 import ParityCase, ParityReport
from penstock.api.types.v1.signature_pb2 import Signature, TensorSpec
from penstock.api.types.v1.variant_pb2 import VariantReport
from penstock.registry.manifest import MANIFEST
from penstock.rpc.validation import Violations
from penstock.storage.artifacts import checked_blob

GRAPH = "model.onnx"
DATATYPES = frozenset(
    ["BOOL", "BYTES", "FP16", "BF16", "FP32", "FP64"]
    + [f"{kind}{bits}" for kind in ("INT", "UINT") for bits in (8, 16, 32, 64)]
)
MAX_VERSION_BYTES = 1024 * 1024
MAX_FILES = 100
MAX_METRICS = 100
MAX_LABELS = 10_000
MAX_TARGETS = 10
WHOLE = 100

_NUMBER = re.compile(r"[0-9]+")


def check_number(violations: Violations, field: str, number: int) -> None:
    violations.require(number >= 1, field, f"expected a version's number, 1 or more; got {number}")


def check_alias(violations: Violations, field: str, alias: str) -> None:
    violations.name(field, alias)
    is_number = _NUMBER.fullmatch(alias) is not None
    violations.require(not is_number, field, f"expected a name, which a number is not; got {alias[:80]!r}")


def check_version(violations: Violations, field: str, version: Version) -> None:
    """The input fields of a version. Whether its blobs are there is asked later."""
    size_bytes = version.ByteSize()
    if size_bytes > MAX_VERSION_BYTES:
        # Its faults may be as many as its bytes; to look for them would cost the server more than the client.
        violations.add(field, f"expected a message of at most {MAX_VERSION_BYTES:,} bytes; got {size_bytes:,}")
        return
    violations.name(f"{field}.model", version.model)
    _check_files(violations, f"{field}.files", version)
    _check_signature(violations, f"{field}.signature", version.signature)
    if version.HasField("parity"):
        outputs = {spec.name for spec in version.signature.outputs}
        _check_parity(violations, f"{field}.parity", version.parity, outputs)
    _check_count(violations, f"{field}.metrics", len(version.metrics), MAX_METRICS)
    violations.require("" not in version.metrics, f"{field}.metrics", "expected a name for each; one is empty")
    _check_count(violations, f"{field}.labels", len(version.labels), MAX_LABELS)
    _check_provenance(violations, f"{field}.provenance", version.provenance)
    violations.text(f"{field}.description", version.description)


def check_deployment(violations: Violations, field: str, deployment: Deployment) -> None:
    violations.name(f"{field}.model", deployment.model)
    violations.within(f"{field}.targets", len(deployment.targets), 1, MAX_TARGETS)
    for index, target in enumerate(deployment.targets[:MAX_TARGETS]):
        _check_target(violations, f"{field}.targets[{index}]", target)
    total = sum(target.weight for target in deployment.targets)
    violations.require(total == WHOLE, f"{field}.targets", f"expected weights that add up to {WHOLE}; got {total}")


def _check_target(violations: Violations, field: str, target: DeploymentTarget) -> None:
    kind = target.WhichOneof("target")
    if kind == "version":
        check_number(violations, f"{field}.version", target.version)
    elif kind == "alias":
        check_alias(violations, f"{field}.alias", target.alias)
    else:
        violations.add(field, "expected a version or an alias; got neither")
    violations.within(f"{field}.weight", target.weight, 1, WHOLE)


def _check_files(violations: Violations, field: str, version: Version) -> None:
    _check_count(violations, field, len(version.files), MAX_FILES)
    violations.require(GRAPH in version.files, field, f"expected {GRAPH!r} among the files")
    for name, blob in sorted(version.files.items())[:MAX_FILES]:
        path = f'{field}["{name[:80]}"]'
        violations.file_name(path, name)
        violations.require(name != MANIFEST, path, "the server writes the manifest; leave it out")
        checked_blob(violations, path, blob)


def _check_signature(violations: Violations, field: str, signature: Signature) -> None:
    for side, specs in (("inputs", signature.inputs), ("outputs", signature.outputs)):
        violations.require(len(specs) > 0, f"{field}.{side}", "expected at least one; got none")
        for index, spec in enumerate(specs):
            _check_tensor(violations, f"{field}.{side}[{index}]", spec)
        _check_unique(violations, f"{field}.{side}", (spec.name for spec in specs))


def _check_tensor(violations: Violations, field: str, spec: TensorSpec) -> None:
    violations.require(spec.name != "", f"{field}.name", "expected a name; got none")
    if spec.datatype not in DATATYPES:
        expected = f"expected one of {', '.join(sorted(DATATYPES))}"
        violations.add(f"{field}.datatype", f"{expected}; got {spec.datatype[:80]!r}")
    for axis, dimension in enumerate(spec.shape):
        extent = dimension.WhichOneof("extent")
        fits = dimension.size >= 0 if extent == "size" else extent == "name" and dimension.name != ""
        violations.require(fits, f"{field}.shape[{axis}]", "expected a size of 0 or more, or a name that is not empty")


def _check_unique(violations: Violations, field: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for index, name in enumerate(names):
        violations.require(name not in seen, f"{field}[{index}].name", f"{name[:80]!r} is used twice")
        seen.add(name)


def _check_parity(violations: Violations, field: str, parity: ParityReport, outputs: set[str]) -> None:
    violations.require(len(parity.cases) > 0, f"{field}.cases", "expected at least one; got none")
    for name in ("max_absolute_error", "max_relative_error", "absolute_tolerance", "relative_tolerance"):
        _check_error(violations, f"{field}.{name}", getattr(parity, name))
    violations.within(f"{field}.argmax_agreement", parity.argmax_agreement, 0, 1)
    violations.require(parity.row_count >= 0, f"{field}.row_count", f"expected 0 or more; got {parity.row_count}")
    for index, tolerance in enumerate(parity.tolerances):
        _check_error(violations, f"{field}.tolerances[{index}].absolute", tolerance.absolute)
        _check_error(violations, f"{field}.tolerances[{index}].relative", tolerance.relative)
    for index, case in enumerate(parity.cases):
        _check_case(violations, f"{field}.cases[{index}]", case, outputs)
    if parity.HasField("variants"):
        _check_variants(violations, f"{field}.variants", parity.variants, outputs)


def _check_variants(violations: Violations, field: str, report: VariantReport, outputs: set[str]) -> None:
    kept = {variant.name for variant in report.variants if variant.HasField("measurement") and not variant.dropped}
    known = report.chosen in kept
    violations.require(known, f"{field}.chosen", f"expected a measured, kept variant; got {report.chosen[:80]!r}")
    for index, variant in enumerate(report.variants):
        for place, error in enumerate(variant.measurement.errors):
            at = f"{field}.variants[{index}].measurement.errors[{place}]"
            _check_output(violations, at, error.output, outputs)
            for name in ("max_absolute_error", "mean_absolute_error", "relative_error"):
                _check_error(violations, f"{at}.{name}", getattr(error, name))
            violations.within(f"{at}.argmax_agreement", error.argmax_agreement, 0, 1)


def _check_case(violations: Violations, field: str, case: ParityCase, outputs: set[str]) -> None:
    _check_output(violations, field, case.output, outputs)
    violations.require(case.batch_size >= 0, f"{field}.batch_size", f"expected 0 or more; got {case.batch_size}")
    _check_error(violations, f"{field}.max_absolute_error", case.max_absolute_error)
    _check_error(violations, f"{field}.max_relative_error", case.max_relative_error)
    violations.within(f"{field}.argmax_agreement", case.argmax_agreement, 0, 1)


def _check_output(violations: Violations, field: str, output: str, outputs: set[str]) -> None:
    known = output in outputs
    violations.require(known, f"{field}.output", f"expected an output of the signature; got {output[:80]!r}")


def _check_error(violations: Violations, field: str, value: float) -> None:
    fits = math.isfinite(value) and value >= 0
    violations.require(fits, field, f"expected a finite number, 0 or more; got {value}")


def _check_provenance(violations: Violations, field: str, provenance: Provenance) -> None:
    violations.text(f"{field}.job_id", provenance.job_id)
    violations.text(f"{field}.dataset", provenance.dataset)
    if provenance.dataset_digest:
        violations.digest(f"{field}.dataset_digest", provenance.dataset_digest)


def _check_count(violations: Violations, field: str, count: int, most: int) -> None:
    violations.require(count <= most, field, f"expected at most {most:,}; got {count:,}")
