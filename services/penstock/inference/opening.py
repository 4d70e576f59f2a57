"""From a folder with a model in it to something that can be served: complete its configuration, open, warm up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from penstock.inference.folder import is_name
from penstock.inference.inference import Loaded
from penstock.inference.model_config import model_file
from penstock.inference.signature import Signature
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import WrongStateError


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

    def path(self) -> Path:
        """The file to open, in its version's folder or in a folder of its own name there, and nowhere else.

        Raises `WrongStateError` if the configuration names anything but a plain name, or a file that is not there.
        """
        name = model_file(self.config)
        if not is_name(name):
            raise WrongStateError(f"default_model_filename {name[:80]!r} is no plain name.")
        path = self.folder / name
        if path.is_dir():
            path /= name
        if not path.is_file():
            raise WrongStateError(f"There is no file {name!r} in the folder of {self.title}.")
        return path


class Opener(Protocol):
    """Opens models of any kind."""

    async def open(self, files: ModelFiles) -> Loaded:
        """Raises `PenstockError` where the version cannot be served; the text says why and what to do."""
