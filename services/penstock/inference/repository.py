"""The versions that this server serves, and which of them answers a request.

Reconciles what is there with the desired state of a source, a registry or a folder. Routing switches to the wanted
versions of a model once all of them are READY; until then the ones that served before go on. A version is dropped when
it is neither wanted nor routed to.
"""

import asyncio
import random
import re
from collections.abc import Mapping, Sequence

import structlog

from penstock.api.types.v1.error_reason_pb2 import ErrorReason
from penstock.inference.metrics import LoadMetrics
from penstock.inference.served_version import ServedVersion, State
from penstock.inference.wanted import Desired, Prune, VersionKey, WantedVersion
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


# The weight of each version of one model, in the order of the desired state.
Weights = Mapping[VersionKey, int]


class Repository:
    """Owns every served version and the routes to them. Lives on the event loop; `apply` and `route` never wait."""

    def __init__(self, prune: Prune, loads: LoadMetrics, *, retries: bool) -> None:
        """`prune` forgets what no version needs; with `retries` a version that failed is tried again by itself."""
        self._prune = prune
        self._loads = loads
        self._retries = retries
        self._revision: int | None = None
        self._wanted: dict[str, Weights] = {}
        self._routes: dict[str, Weights] = {}
        # The one version that answers, of models with only one: what almost every request asks for.
        self._only: dict[str, ServedVersion] = {}
        self._versions: dict[VersionKey, ServedVersion] = {}
        self._needs: dict[VersionKey, frozenset[str]] = {}
        self._retiring: dict[asyncio.Task[None], ServedVersion] = {}
        self._changed = asyncio.Event()
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

    def apply(self, desired: Desired) -> None:
        """Makes this the desired state: starts what is missing, tries what failed again, retires what is not wanted."""
        if self._draining:
            return
        self._revision = desired.revision
        grouped = desired.by_model()
        self._wanted = {model: _weights(versions) for model, versions in grouped.items()}
        for wanted in desired.versions:
            self._want(wanted)
        self._reconcile()
        self._prune(self._kept())

    def apply_model(self, model: str, versions: Sequence[WantedVersion]) -> None:
        """Makes this the desired state of one model, and leaves the others alone. No versions: it is not wanted.

        Raises `NotReadyError` while draining.
        """
        self._refuse_if_draining()
        self._revision = self._revision or 0
        self._wanted[model] = _weights(versions)
        if not versions:
            del self._wanted[model]
        for wanted in versions:
            self._want(wanted)
        self._reconcile()
        self._prune(self._kept())

    async def model_settled(self, model: str) -> list[ServedVersion]:
        """The wanted versions of a model, when each is READY or FAILED. Raises `NotReadyError` while draining."""
        while True:
            # Who drains retires versions that are still wanted.
            self._refuse_if_draining()
            self._changed.clear()
            versions = [self._versions[key] for key in self._wanted.get(model, {})]
            if all(version.state is not State.LOADING for version in versions):
                return versions
            await self._changed.wait()

    async def model_gone(self, model: str) -> None:
        """Returns when no version of a model is left, wanted or retiring."""
        while self.versions(model):
            self._changed.clear()
            await self._changed.wait()

    def wanted(self, model: str) -> bool:
        return model in self._wanted

    def needs(self, model: str) -> frozenset[str]:
        """The models that a wanted one is made of; none unless it is an ensemble."""
        return frozenset().union(*(self._needs.get(key, frozenset()) for key in self._wanted.get(model, {})))

    def route(self, model: str, version: str) -> ServedVersion:
        """The version that answers one request: the one that is named, or one of the deployed ones by their weights.

        Raises:
            UnknownModelError: the model is not deployed, or not in this version.
            InvalidFieldError: `version` is neither empty nor a number.
            NotReadyError: the server or the named version drains, or no version of the model has ever been ready.
        """
        if (only := self.only(model, version)) is not None:
            return only
        self._refuse_if_draining()
        if version:
            return self._numbered(model, version)
        route = self._route(model)
        (key,) = random.choices(list(route), list(route.values()))  # noqa: S311  # splits traffic, guards nothing
        return self._versions[key]

    def only(self, model: str, version: str) -> ServedVersion | None:
        """The version that `route` would return, if no dice are thrown for it and nothing speaks against it."""
        return self._only.get(model) if not version and not self._draining else None

    def describe(self, model: str, version: str) -> ServedVersion:
        """As `route`, but of several deployed versions always the one with the greatest weight."""
        self._refuse_if_draining()
        if version:
            return self._numbered(model, version)
        route = self._route(model)
        return self._versions[max(route, key=lambda key: route[key])]

    def weight(self, version: ServedVersion) -> int:
        """Percent of the model's requests without a version number that this version answers now."""
        key = version.wanted.key
        route = self._routes.get(key.model, {})
        if self._versions.get(key) is not version or key not in route:
            return 0
        return round(100 * route[key] / sum(route.values()))

    def versions(self, model: str = "") -> list[ServedVersion]:
        """Every version that is to be served or still is, of one model or of all, by model and number."""
        held = [*self._versions.values(), *self._retiring.values()]
        found = [version for version in held if model in ("", version.model)]
        return sorted(found, key=lambda version: (version.model, version.number))

    def drain(self) -> None:
        """Refuses everything new; what is queued is finished."""
        self._draining = True
        self._changed.set()

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

    def _want(self, wanted: WantedVersion) -> None:
        self._needs[wanted.key] = wanted.needs
        if wanted.key in self._versions:
            self._versions[wanted.key].try_again()
        else:
            self._versions[wanted.key] = ServedVersion(wanted, self._on_change, retries=self._retries)

    def _on_change(self, version: ServedVersion) -> None:
        self._changed.set()
        self._reconcile()
        if version.state in (State.READY, State.FAILED):
            self._loads.record(version.load_ns, succeeded=version.state is State.READY)
        if version.state is State.READY:
            for key, needs in self._needs.items():
                if version.model in needs and key in self._versions:
                    self._versions[key].try_again()

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
        if ready and not any(ready.values()):
            # Nobody said how to split the requests: the newest version takes them all.
            newest = max(ready, key=lambda key: key.number)
            ready = {key: int(key == newest) for key in ready}
        if ready != route:
            _log.info("route", model=model, versions={key.number: weight for key, weight in ready.items()})
        self._routes[model] = ready
        if not ready:
            del self._routes[model]
        self._only.pop(model, None)
        answering = [key for key, weight in ready.items() if weight]
        if len(answering) == 1:
            self._only[model] = self._versions[answering[0]]

    def _retire(self, key: VersionKey) -> None:
        version = self._versions.pop(key)
        self._needs.pop(key, None)
        task = asyncio.create_task(version.close())
        self._retiring[task] = version
        task.add_done_callback(self._retired)

    def _retired(self, task: asyncio.Task[None]) -> None:
        del self._retiring[task]
        self._changed.set()
        if not self._draining:
            self._prune(self._kept())

    def _kept(self) -> set[str]:
        return {name for version in self._versions.values() for name in version.wanted.source.keeps}

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
        found = [held for held in self.versions(model) if held.number == number]
        if not model or not found:
            numbers = ", ".join(str(held.number) for held in self.versions(model)) if model else ""
            raise UnknownModelError(model, version, f"Versions served here: {numbers or 'none'}.")
        best = min(found, key=lambda held: held.state is not State.READY)
        if best.state is State.DRAINING:
            # It still tells what it takes, to those whose answers it owes.
            _ = best.loaded
        return best


def _weights(versions: Sequence[WantedVersion]) -> Weights:
    return {wanted.key: wanted.weight for wanted in versions}
