"""What clients may ask of the source of models: to load one, to unload one, to list them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class IndexEntry:
    """One line of RepositoryIndex. A model that is known and not loaded has neither version nor state."""

    model: str
    version: str
    # LOADING, READY, UNLOADING, UNAVAILABLE, or empty.
    state: str
    reason: str


class ModelControl(Protocol):
    """A source of models. The registry's is one, a folder is another."""

    async def load(self, model: str, config_json: str | None, files: Mapping[str, bytes]) -> None:
        """Loads or reloads a model; returns when all its wanted versions are READY.

        `config_json` takes the place of the model's own configuration. `files` are uploads by their names as the wire
        has them, `file:<version>/<name>`; they take the place of the model's own files and need `config_json`.

        Raises:
            WrongStateError: models of this source are not loaded by request, or the model cannot be served ("failed
                to load 'x', …"); what it served before goes on being served.
            InvalidFieldError: a name, the configuration or an upload is wrong.
            NotReadyError: the server drains.
        """

    async def unload(self, model: str, unload_dependents: bool) -> None:
        """Unloads a model, with the models that the ensemble consists of if told to.

        Returns when its requests in flight have been answered and its memory has been given back.

        Raises:
            WrongStateError: models of this source are not unloaded by request.
            UnknownModelError: no such model is loaded.
            NotReadyError: requests in flight take longer than the limit; the model goes when they have ended.
        """

    async def index(self) -> Sequence[IndexEntry]:
        """Every version that is held, and every model that is known and not loaded, by name and number."""
