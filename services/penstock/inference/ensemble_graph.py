"""The graph of an ensemble: which model makes which tensor, and whether all of it fits together."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from penstock.inference.inference import Inference
from penstock.inference.signature import Signature, Tensor
from penstock.inference.tensors import Array
from penstock.oip.model_config_pb2 import ModelConfig, ModelEnsembling
from penstock.rpc.errors import NotReadyError, PenstockError, WrongStateError

# Deeper nesting is nobody's intention; it bounds the walk that looks for cycles, and the stack.
MAX_DEPTH = 16


class Member(Protocol):
    """A loaded version, as an ensemble needs it. The properties raise `NotReadyError` while it cannot be used."""

    @property
    def signature(self) -> Signature:
        """What it takes and gives."""

    @property
    def config(self) -> ModelConfig:
        """Its complete configuration."""

    async def infer(self, inference: Inference) -> list[Array]:
        """As `Scheduler.infer`."""


# The version that serves a model, by name and version; "" is the one that clients get who name none.
Lookup = Callable[[str, str], Member]


@dataclass(frozen=True)
class Step:
    """A model, its inputs and its outputs, both from the model's names to the ensemble's tensors."""

    title: str
    model: str
    version: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]

    @classmethod
    def of(cls, index: int, step: ModelEnsembling.Step) -> "Step":
        version = str(step.model_version) if step.model_version > 0 else ""
        return cls(
            f"step {index} ({step.model_name!r})", step.model_name, version, dict(step.input_map), dict(step.output_map)
        )


class EnsembleGraph:
    """An ensemble's steps, in the configuration's order."""

    def __init__(self, title: str, config: ModelConfig, signature: Signature) -> None:
        """Raises `WrongStateError` for a graph that cannot run, whatever its models are."""
        self._title = title
        self._config = config
        self._signature = signature
        self.steps = [Step.of(index, step) for index, step in enumerate(config.ensemble_scheduling.step)]
        # By tensor, the step that makes it, and its output there.
        self._makers: dict[str, tuple[Step, str]] = {}
        for step in self.steps:
            self._add(step)
        self._check_sources()
        self._check_order()

    def needed(self, wanted: Sequence[str]) -> dict[str, dict[str, str]]:
        """By step's title, its outputs that lead to the wanted tensors, with the tensors that they make."""
        needed: dict[str, dict[str, str]] = {}
        found, following = set(wanted), list(wanted)
        while following:
            name = following.pop()
            if name not in self._makers:
                continue
            step, output = self._makers[name]
            needed.setdefault(step.title, {})[output] = name
            new = set(step.inputs.values()) - found
            found |= new
            following.extend(new)
        return needed

    def check(self, lookup: Lookup) -> None:
        """Compares the models' signatures with what they are given.

        Raises `WrongStateError` where they do not fit, one is unknown or an ensemble is part of itself, and
        `NotReadyError` while one is not ready.
        """
        self._check_cycle(lookup, self.steps, (self._config.name,), set())
        tensors = {name: (tensor, "the ensemble") for name, tensor in self._signature.inputs.items()}
        members = {step.title: self._member(lookup, step) for step in self.steps}
        for step in self.steps:
            member = members[step.title]
            self.check_names(step, member.signature)
            self._check_batch(step, member)
            for name, made in step.outputs.items():
                tensors[made] = (member.signature.outputs[name], step.title)
        for step in self.steps:
            for name, taken in step.inputs.items():
                wanted = members[step.title].signature.inputs[name]
                self._check_fit(f"{step.title} takes tensor {taken!r} as '{wanted}'", wanted, *tensors[taken])
        for name, wanted in self._signature.outputs.items():
            self._check_fit(f"the ensemble's output is '{wanted}'", wanted, *tensors[name])

    def check_names(self, step: Step, signature: Signature) -> None:
        """Raises `WrongStateError` unless the step's model has the inputs and outputs that are mapped."""
        for kind, named, known in (
            ("input", step.inputs, signature.inputs),
            ("output", step.outputs, signature.outputs),
        ):
            if unknown := [name for name in named if name not in known]:
                raise self._wrong(f"{step.title} maps {kind} {unknown[0]!r}; the model has {', '.join(known)}")
        missing = [name for name, one in signature.inputs.items() if name not in step.inputs and not one.optional]
        if missing:
            raise self._wrong(f"{step.title} maps no tensor to the model's input {missing[0]!r}")

    def _add(self, step: Step) -> None:
        if not step.model or not step.outputs:
            raise self._wrong(f"{step.title} needs a model_name and an output_map")
        for output, made in step.outputs.items():
            if made in self._signature.inputs:
                raise self._wrong(f"{step.title} makes tensor {made!r}, which is an input of the ensemble")
            if made in self._makers:
                raise self._wrong(f"{step.title} makes tensor {made!r}, which {self._makers[made][0].title} makes, too")
            self._makers[made] = (step, output)

    def _check_sources(self) -> None:
        if not self.steps:
            raise self._wrong("it has no steps")
        known = self._makers.keys() | self._signature.inputs.keys()
        for step in self.steps:
            for name, taken in step.inputs.items():
                if taken not in known:
                    raise self._wrong(f"no step makes tensor {taken!r}, which {step.title} takes as {name!r}")
        for name in self._signature.outputs:
            if name not in known:
                raise self._wrong(f"no step makes tensor {name!r}, an output of the ensemble")

    def _check_order(self) -> None:
        known, left = set(self._signature.inputs), list(self.steps)
        while left:
            ready = [step for step in left if known.issuperset(step.inputs.values())]
            if not ready:
                waited = sorted({taken for step in left for taken in step.inputs.values()} - known)
                raise self._wrong(
                    f"{', '.join(step.title for step in left)} wait for one another in a cycle, for {', '.join(waited)}"
                )
            known.update(made for step in ready for made in step.outputs.values())
            left = [step for step in left if step not in ready]

    def _member(self, lookup: Lookup, step: Step) -> Member:
        """The step's model, READY."""
        try:
            member = lookup(step.model, step.version)
            _ = member.signature
        except NotReadyError as error:
            raise NotReadyError(f"{self._title}: {step.title} is not ready: {error.message}") from error
        except PenstockError as error:
            raise self._wrong(f"{step.title}: {error.message.rstrip('.')}") from error
        return member

    def _check_cycle(
        self, lookup: Lookup, steps: Sequence[Step], path: tuple[str, ...], seen: set[tuple[str, str]]
    ) -> None:
        """Follows the ensembles in this one. A model's name is what counts: its versions may change at any time."""
        for step in steps:
            inner = (*path, step.model)
            if step.model in path or len(inner) > MAX_DEPTH:
                what = "it is part of itself" if step.model in path else f"it is deeper than {MAX_DEPTH} ensembles"
                raise self._wrong(f"{what}: {' → '.join(inner)}")
            if (step.model, step.version) in seen:
                continue
            config = self._member(lookup, step).config
            following = [Step.of(index, one) for index, one in enumerate(config.ensemble_scheduling.step)]
            self._check_cycle(lookup, following, inner, seen)
            seen.add((step.model, step.version))

    def _check_batch(self, step: Step, member: Member) -> None:
        if not (self._signature.batched and member.signature.batched):
            return
        allowed, asked = member.config.max_batch_size, self._config.max_batch_size
        if asked > allowed:
            raise self._wrong(
                f"it allows a max_batch_size of {asked}, and the model of {step.title} {allowed}. Lower the "
                f"ensemble's, or raise the model's"
            )

    def _check_fit(self, what: str, wanted: Tensor, given: Tensor, origin: str) -> None:
        """Axes that are dynamic on either side are compared when there are sizes."""
        fits = len(wanted.shape) == len(given.shape) and all(
            one == other or isinstance(one, str) or isinstance(other, str)
            for one, other in zip(wanted.shape, given.shape, strict=True)
        )
        if wanted.datatype is not given.datatype or not fits:
            raise self._wrong(f"{what}; {origin} gives it as '{given}'")
        if given.optional and not wanted.optional:
            raise self._wrong(f"{what}, always; {origin} may leave {given.name!r} out")

    def _wrong(self, text: str) -> WrongStateError:
        return WrongStateError(f"{self._title}: the ensemble cannot be served: {text}.")
