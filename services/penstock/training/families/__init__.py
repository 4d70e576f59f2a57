"""Model families: small modules behind one interface, `penstock.training.families.interface`."""

from penstock.api.dataset.v1.dataset_pb2 import Dataset
from penstock.api.training.v1.job_pb2 import JobSpec
from penstock.training.families.interface import Family, SpecError
from penstock.training.families.mlp import Mlp


def family_of(spec: JobSpec, dataset: Dataset, state_tag: str) -> Family:
    """The family that a spec names. Raises `SpecError` if this worker does not know it."""
    match spec.WhichOneof("family"):
        case "mlp":
            return Mlp(spec, dataset, state_tag)
        case other:
            raise SpecError(f"This worker knows no model family {other!r}. Update it, or choose another family.")
