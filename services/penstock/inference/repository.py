"""The versions that this server serves, and which of them answers a request.

Reconciles what is there with the registry's desired state. Routing switches to the wanted versions of a model once all
of them are READY; until then the ones that served before go on. A version is dropped when it is neither wanted nor
routed to.
"""

import asyncio
import random
import re
from collections.abc import Mapping
from dataclasses import dataclass

import structlog

from penstock.api.registry.v1.deployment_service_pb2 import WatchResponse
from penstock.api.registry.v1.model_pb2 import Version
from penstock.api.types.v1.error_reason_pb2 import ErrorReason
from penstock.inference.batcher import BatchLimits
from penstock.inference.loader import Loader, file_digests
from penstock.inference.served_version import ServedVersion, State
from penstock.rpc.errors import InvalidFieldError, NotReadyError, PenstockError

_VERSION_NUMBER = re.compile(r"[1-9][0-9]{0,17}")

_log = structlog.get_logger("penstock.inference.repository")


class UnknownModelError(PenstockError):
    """No such model or version is served. Clients of the Open Inference Protocol look for the text's first words."""

    reason = ErrorReason.ERROR_REASON_RESOURCE_NOT_FOUND

    def __init__(self, model: str, version: str, remedy: str) -> None:
        name = f"{model[:80]!r} version {version}" if version else repr(model[:80])
        super().__init__(
            f"Request for unknown model: {name} is not found. {remedy}",
            resource_type="version" if version else "model",
            resource_name=f"{model[:80]}/{version}" if version else model[:80],
        )


@dataclass(frozen=True)
class VersionKey:
    """One bundle under one number. A registry that was set up anew may use a number again for another bundle."""

    model: str
    number: int
    bundle_digest: str

    @classmethod
    def of(cls, version: Version) -> "VersionKey":
        return cls(version.model, version.number, version.bundle_digest)


# The weight of each version of one model, in the order of the desired state.
Weights = Mapping[VersionKey, int]


class Repository:
    """Owns every served version and the routes to them. Lives on the event loop; `apply` and `route` never wait."""

    def __init__(self, loader: Loader, limits: BatchLimits) -> None:
        self._loader = loader
        self._limits = limits
        self._revision: int | None = None
        self._wanted: dict[str, Weights] = {}
        self._routes: dict[str, Weights] = {}
        self._versions: dict[VersionKey, ServedVersion] = {}
        self._retiring: dict[asyncio.Task[None], ServedVersion] = {}
        self._draining = False

    @property
    def revision(self) -> int:
        """The revision of the desired state that is followed; 0 before the first."""
        return self._revision or 0

    @property
    def settled(self) -> bool:
        """Whether a desired state is known and each wanted version is READY or FAILED; false while draining."""
        return (
            self._revision is not None
            and not self._draining
            and all(
                self._versions[key].state is not State.LOADING for weights in self._wanted.values() for key in weights
            )
        )

    def apply(self, desired: WatchResponse) -> None:
        """Makes this the desired state: starts what is missing, tries what failed again, retires what is not wanted."""
        if self._draining:
            return
        self._revision = desired.revision
        self._wanted = {
            model.model: {VersionKey.of(wanted.version): wanted.weight for wanted in model.versions}
            for model in desired.models
        }
        for model in desired.models:
            for wanted in model.versions:
                self._want(wanted.version)
        self._reconcile()
        self._loader.prune(self._needed_digests())

    def route(self, model: str, version: str) -> ServedVersion:
        """The version that answers one request: the one that is named, or one of the deployed ones by their weights.

        Raises:
            UnknownModelError: the model is not deployed, or not in this version.
            InvalidFieldError: `version` is neither empty nor a number.
            NotReadyError: the server drains, or no version of the model has ever been ready.
        """
        self._refuse_if_draining()
        if version:
            return self._numbered(model, version)
        route = self._route(model)
        (key,) = random.choices(list(route), list(route.values()))  # noqa: S311  # splits traffic, guards nothing
        return self._versions[key]

    def describe(self, model: str, version: str) -> ServedVersion:
        """As `route`, but of several deployed versions always the one with the greatest weight."""
        self._refuse_if_draining()
        if version:
            return self._numbered(model, version)
        route = self._route(model)
        return self._versions[max(route, key=lambda key: route[key])]

    def weight(self, version: ServedVersion) -> int:
        """Percent of the model's requests without a version number that this version answers now."""
        key = VersionKey.of(version.version)
        route = self._routes.get(key.model, {})
        if self._versions.get(key) is not version or key not in route:
            return 0
        return round(100 * route[key] / sum(route.values()))

    def versions(self, model: str = "") -> list[ServedVersion]:
        """Every version that is to be served or still is, of one model or of all, by model and number."""
        held = [*self._versions.values(), *self._retiring.values()]
        found = [version for version in held if model in ("", version.version.model)]
        return sorted(found, key=lambda version: (version.version.model, version.version.number))

    def drain(self) -> None:
        """Refuses everything new; what is queued is finished."""
        self._draining = True

    def _refuse_if_draining(self) -> None:
        if self._draining:
            raise NotReadyError(
                "The inference server is shutting down. Send the request to another one, or again later."
            )

    async def close(self) -> None:
        """Finishes what is queued and unloads everything."""
        self.drain()
        for key in list(self._versions):
            self._retire(key)
        if self._retiring:
            await asyncio.wait(list(self._retiring))

    def _want(self, version: Version) -> None:
        key = VersionKey.of(version)
        if key in self._versions:
            self._versions[key].try_again()
        else:
            self._versions[key] = ServedVersion(version, self._loader, self._limits, self._reconcile)

    def _reconcile(self) -> None:
        """Switches what can be switched and retires what nobody needs. Runs after every change of a state."""
        if self._draining:
            return
        for model in self._routes.keys() | self._wanted.keys():
            self._switch(model, self._wanted.get(model, {}))
        needed = {key for weights in (*self._wanted.values(), *self._routes.values()) for key in weights}
        for key in self._versions.keys() - needed:
            self._retire(key)

    def _switch(self, model: str, wanted: Weights) -> None:
        """Routes to the wanted versions that are READY, unless that would take one away before all others are."""
        ready = {key: weight for key, weight in wanted.items() if self._versions[key].state is State.READY}
        route = self._routes.get(model, {})
        if len(ready) < len(wanted) and not route.keys() <= wanted.keys():
            return
        if ready != route:
            _log.info("route", model=model, versions={key.number: weight for key, weight in ready.items()})
        self._routes[model] = ready
        if not ready:
            del self._routes[model]

    def _retire(self, key: VersionKey) -> None:
        version = self._versions.pop(key)
        task = asyncio.create_task(version.close())
        self._retiring[task] = version
        task.add_done_callback(self._retired)

    def _retired(self, task: asyncio.Task[None]) -> None:
        del self._retiring[task]
        if not self._draining:
            self._loader.prune(self._needed_digests())

    def _needed_digests(self) -> set[str]:
        return {digest for version in self._versions.values() for digest in file_digests(version.version)}

    def _route(self, model: str) -> Weights:
        if route := self._routes.get(model):
            return route
        for key in self._wanted.get(model, {}):
            # Tells the caller why: nothing of this model is READY.
            _ = self._versions[key].signature
        raise UnknownModelError(model, "", f"Models served here: {', '.join(sorted(self._wanted)) or 'none'}.")

    def _numbered(self, model: str, version: str) -> ServedVersion:
        if not _VERSION_NUMBER.fullmatch(version):
            raise InvalidFieldError.of("model_version", f"expected a version's number in decimal; got {version[:80]!r}")
        number = int(version)
        found = [held for held in self.versions(model) if held.version.number == number]
        if not model or not found:
            numbers = ", ".join(str(held.version.number) for held in self.versions(model)) if model else ""
            raise UnknownModelError(model, version, f"Versions served here: {numbers or 'none'}.")
        return min(found, key=lambda held: held.state is not State.READY)
