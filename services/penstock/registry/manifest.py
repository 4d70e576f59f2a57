"""The manifest of a bundle: the canonical text whose digest names the bundle's content."""

import json

from penstock.api.registry.v1.model_pb2 import Version
from penstock.api.types.v1.signature_pb2 import TensorSpec
from penstock.api.types.v1.variant_pb2 import VariantReport

MANIFEST = "manifest.json"
FORMAT = 1


def manifest_of(version: Version) -> bytes:
    """The manifest of a version: JSON in UTF-8, keys sorted, no white space.

    It holds what the answers of a bundle depend on and how far they may be trusted: files, signature, labels and the
    totals of the parity report. What belongs to one registration (number, metrics, provenance) is left out: equal
    bundles have equal digests. Dimensions are a number or a name, as in the signature.
    """
    content: dict[str, object] = {
        "format": FORMAT,
        "files": {name: {"digest": blob.digest, "size_bytes": blob.size_bytes} for name, blob in version.files.items()},
        "inputs": [_tensor(spec) for spec in version.signature.inputs],
        "outputs": [_tensor(spec) for spec in version.signature.outputs],
        "labels": list(version.labels),
    }
    if version.HasField("parity"):
        parity: dict[str, object] = {
            "max_absolute_error": version.parity.max_absolute_error,
            "max_relative_error": version.parity.max_relative_error,
            "absolute_tolerance": version.parity.absolute_tolerance,
            "relative_tolerance": version.parity.relative_tolerance,
            "source": version.parity.source,
            "runtime": version.parity.runtime,
        }
        # Unlike an fp32 file's, a variant's answers are not those that the parity report is about.
        content["parity"] = parity | _chosen_variant(version.parity.variants)
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.encode()


def _chosen_variant(report: VariantReport) -> dict[str, object]:
    errors = {
        error.output: {"relative_error": error.relative_error, "argmax_agreement": error.argmax_agreement}
        for variant in report.variants
        if variant.name == report.chosen and variant.name != "fp32"
        for error in variant.measurement.errors
    }
    return {"variant": {"name": report.chosen, "errors": errors}} if errors else {}


def _tensor(spec: TensorSpec) -> dict[str, object]:
    shape = [axis.size if axis.WhichOneof("extent") == "size" else axis.name for axis in spec.shape]
    return {"name": spec.name, "datatype": spec.datatype, "shape": shape}
