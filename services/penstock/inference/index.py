"""What RepositoryIndex tells, and the control of models that the registry decides about."""

from collections.abc import Mapping, Sequence

from penstock.inference.control import IndexEntry
from penstock.inference.repository import Repository
from penstock.inference.served_version import State
from penstock.rpc.errors import WrongStateError

NOT_ALLOWED = (
    "explicit model load / unload is not allowed: this server decides itself what it serves. Start it with "
    "--repository and --mode explicit to load models by request."
)

_STATES = {
    State.LOADING: "LOADING",
    State.READY: "READY",
    State.DRAINING: "UNLOADING",
    State.FAILED: "UNAVAILABLE",
}


def index_of(repository: Repository) -> list[IndexEntry]:
    """Every version that the repository holds."""
    return [
        IndexEntry(held.model, str(held.number), _STATES[held.state], held.message) for held in repository.versions()
    ]


class RegistryControl:
    """The `ModelControl` of a server that follows a registry: deployments say what is served."""

    def __init__(self, repository: Repository) -> None:
        self._repository = repository

    async def load(self, model: str, config_json: str | None, files: Mapping[str, bytes]) -> None:
        raise WrongStateError(NOT_ALLOWED)

    async def unload(self, model: str, unload_dependents: bool) -> None:
        raise WrongStateError(NOT_ALLOWED)

    async def index(self) -> Sequence[IndexEntry]:
        return index_of(self._repository)
