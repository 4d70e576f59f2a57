"""What this server is to serve, whoever says so: the registry or a folder."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from penstock.inference.inference import Loaded


class VersionKey(NamedTuple):
    """One content under one number: a number may come again, for another bundle or a changed file."""

    model: str
    number: int
    digest: str


class Source(Protocol):
    """Where one version comes from."""

    @property
    def keeps(self) -> Collection[str]:
        """Names of what must be kept while the version is held, as `Prune` takes them."""

    async def load(self) -> Loaded:
        """Raises `PenstockError` where the version cannot be served; the text says why and what to do."""


# Forgets everything whose name is not among these.
Prune = Callable[[set[str]], None]


@dataclass(frozen=True)
class WantedVersion:
    """A version that is to be served, with its share of the requests that name no version.

    Where no version of a model has a weight, the highest number answers those.
    """

    model: str
    number: int
    # `sha256:…` of its content.
    digest: str
    weight: int
    source: Source = field(compare=False)
    # Models that it is made of, if it is an ensemble: one that failed is tried again when one of them has become READY.
    needs: frozenset[str] = frozenset()

    @property
    def key(self) -> VersionKey:
        return VersionKey(self.model, self.number, self.digest)


@dataclass(frozen=True)
class Desired:
    """Everything that is to be served; what is not in it is not. The order of versions is the source's."""

    revision: int
    versions: tuple[WantedVersion, ...] = ()

    def by_model(self) -> dict[str, list[WantedVersion]]:
        grouped: dict[str, list[WantedVersion]] = {}
        for wanted in self.versions:
            grouped.setdefault(wanted.model, []).append(wanted)
        return grouped

    @classmethod
    def of(cls, revision: int, versions: Iterable[WantedVersion]) -> "Desired":
        return cls(revision, tuple(versions))
