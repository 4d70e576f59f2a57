"""From a folder with a model in it to something that can be served: complete its configuration, open, warm up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from penstock.inference.inference import Loaded
from penstock.inference.signature import Signature
from penstock.oip.model_config_pb2 import ModelConfig


@dataclass(frozen=True)
class ModelFiles:
    """One version on disk: `folder` has its model file and, beside it, the external data that it names."""

    model: str
    number: int
    folder: Path
    # As its owner wrote it; empty fields are completed from the graph.
    config: ModelConfig
    # The registry's, with which the graph has to agree; None: the graph's own.
    signature: Signature | None
    labels: Mapping[str, Sequence[str]]
    # Whether it lies in the operator's own folder: only from there is Python code run.
    trusted: bool = False

    @property
    def title(self) -> str:
        return f"Model {self.model!r} version {self.number}"


class Opener(Protocol):
    """Opens models of any kind."""

    async def open(self, files: ModelFiles) -> Loaded:
        """Raises `PenstockError` where the version cannot be served; the text says why and what to do."""
