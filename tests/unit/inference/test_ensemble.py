"""Ensembles of real graphs, each behind an engine on ONNX Runtime."""

import asyncio
from dataclasses import dataclass, field

import numpy as np
import onnxruntime
import pytest
from google.protobuf import text_format
from onnx import helper
from tests.integration.inference.graphs import Bundle, bundle_of, scale, value

from penstock.inference.ensemble import EnsembleScheduler, Member
from penstock.inference.inference import Inference
from penstock.inference.signature import BATCH, Signature, Tensor
from penstock.inference.statistics import Statistics
from penstock.inference.tensors import DATATYPES, Array
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import (
    DeadlineError,
    InvalidFieldError,
    NotFoundError,
    NotReadyError,
    PenstockError,
    WrongStateError,
)

ROWS = np.array([[1, 2, 3, 4]], np.float32)


@dataclass
class Model:
    """A loaded model. Its runs wait for the gate, and are told to `log`."""

    signature: Signature
    config: ModelConfig
    session: onnxruntime.InferenceSession
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    begun: asyncio.Event = field(default_factory=asyncio.Event)
    seen: list[Inference] = field(default_factory=list)
    cancelled: int = 0

    @classmethod
    def of(cls, bundle: Bundle, max_batch_size: int = 8) -> "Model":
        session = onnxruntime.InferenceSession(bundle.files["model.onnx"])
        model = cls(Signature.of(bundle.signature), ModelConfig(max_batch_size=max_batch_size), session)
        model.gate.set()
        return model

    async def infer(self, inference: Inference) -> list[Array]:
        self.seen.append(inference)
        self.begun.set()
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        try:
            answers: list[Array] = self.session.run(list(inference.outputs), inference.inputs)
        except Exception as error:
            raise PenstockError("cannot compute") from error
        return answers


@dataclass
class Inner:
    """A loaded ensemble."""

    scheduler: EnsembleScheduler
    signature: Signature
    config: ModelConfig

    async def infer(self, inference: Inference) -> list[Array]:
        return await self.scheduler.infer(inference)


class Server:
    def __init__(self) -> None:
        self.models: dict[str, Member] = {}

    def lookup(self, model: str, version: str) -> Member:
        if model not in self.models or version not in ("", "3"):
            raise NotFoundError("model", model)
        return self.models[model]

    def ensemble(
        self,
        steps: str,
        outputs: str = "out",
        *,
        name: str = "all",
        batched: bool = True,
        shape: tuple[int, ...] = (4,),
    ) -> Inner:
        config = text_format.Parse(f'name: "{name}" ensemble_scheduling {{ {steps} }}', ModelConfig())
        config.max_batch_size = 8 if batched else 0
        head: tuple[int | str, ...] = (BATCH,) if batched else ("rows",)
        tensors = [Tensor(one, DATATYPES["FP32"], (*head, 4)) for one in ("in", *outputs.split())]
        signature = Signature.made(tensors[:1], tensors[1:])
        statistics = Statistics()
        scheduler = EnsembleScheduler(f"Model {name!r} version 1", config, signature, self.lookup, statistics)
        inner = Inner(scheduler, signature, config)
        self.models[name] = inner
        self.statistics = statistics
        return inner


def step(model: str, inputs: str, outputs: str, version: int = -1) -> str:
    def mapped(kind: str, pairs: str) -> str:
        parts = [pair.split("=") for pair in pairs.split()]
        return " ".join(f'{kind} {{ key: "{key}" value: "{tensor}" }}' for key, tensor in parts)

    return (
        f'step {{ model_name: "{model}" model_version: {version} {mapped("input_map", inputs)} '
        f"{mapped('output_map', outputs)} }}"
    )


def added() -> Bundle:
    axes: list[int | str] = ["batch", 4]
    return bundle_of(
        [helper.make_node("Add", ["left", "right"], ["sum"])],
        [value("left", "FP32", axes), value("right", "FP32", axes)],
        [value("sum", "FP32", axes)],
    )


@pytest.fixture
def server() -> Server:
    server = Server()
    server.models |= {
        "double": Model.of(scale(2)),
        "triple": Model.of(scale(3)),
        "add": Model.of(added()),
    }
    return server


def request(*outputs: str, rows: Array = ROWS, **options: int) -> Inference:
    return Inference({"in": rows}, outputs or ("out",), len(rows), **options)  # type: ignore[arg-type]


DIAMOND = (
    step("add", "left=two right=three", "sum=out")
    + step("double", "rows=in", "scaled=two", 3)
    + step("triple", "rows=in", "scaled=three")
)


async def test_steps_run_as_soon_as_their_inputs_are_there(server: Server) -> None:
    ensemble = server.ensemble(DIAMOND, "out two").scheduler
    ensemble.check()
    double, triple, add = (server.models[name] for name in ("double", "triple", "add"))
    assert isinstance(double, Model)
    assert isinstance(triple, Model)
    assert isinstance(add, Model)
    double.gate.clear()
    triple.gate.clear()
    inference = request("two", "out")
    running = asyncio.create_task(ensemble.infer(inference))
    async with asyncio.timeout(10):
        await double.begun.wait()
        await triple.begun.wait()
    double.gate.set()
    await asyncio.sleep(0.01)
    assert not add.seen
    triple.gate.set()
    two, out = await running
    assert (two == ROWS * 2).all()
    assert (out == ROWS * 5).all()
    assert (server.statistics.success.count, server.statistics.queue.ns, server.statistics.inference_count) == (1, 0, 1)
    assert inference.run is not None
    assert server.statistics.run.ns == inference.run.ran_ns - inference.arrival_ns
    assert ensemble.pending == 0
    assert ensemble.models == {("add", ""), ("double", "3"), ("triple", "")}


async def test_only_steps_that_lead_to_a_wanted_output_run(server: Server) -> None:
    ensemble = server.ensemble(DIAMOND, "out two").scheduler
    [[two]] = [answers async for answers in ensemble.stream(request("two"))]
    assert (two == ROWS * 2).all()
    seen = {name: len(model.seen) for name, model in server.models.items() if isinstance(model, Model)}
    assert seen == {"double": 1, "triple": 0, "add": 0}
    assert server.models["double"].seen[0].outputs == ("scaled",)  # type: ignore[attr-defined]


async def test_cancelling_it_cancels_its_steps_and_closing_waits(server: Server) -> None:
    ensemble = server.ensemble(DIAMOND).scheduler
    models = [server.models[name] for name in ("double", "triple")]
    for model in models:
        model.gate.clear()  # type: ignore[attr-defined]
    running = asyncio.create_task(ensemble.infer(request()))
    for model in models:
        await model.begun.wait()  # type: ignore[attr-defined]
    closing = asyncio.create_task(ensemble.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    with pytest.raises(NotReadyError, match="unloaded"):
        await ensemble.infer(request())
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    await closing
    assert [model.cancelled for model in models] == [1, 1]  # type: ignore[attr-defined]
    assert server.statistics.failures == {"REJECTED": 1, "CANCELED": 1}


async def test_a_step_that_fails_ends_the_others(server: Server) -> None:
    ensemble = server.ensemble(DIAMOND).scheduler
    double, triple = server.models["double"], server.models["triple"]
    double.gate.clear()  # type: ignore[attr-defined]
    triple.session = None  # type: ignore[attr-defined]
    with pytest.raises(PenstockError, match="cannot compute"):
        await ensemble.infer(request())
    assert double.cancelled == 1  # type: ignore[attr-defined]
    assert server.statistics.failures == {"BACKEND": 1}
    with pytest.raises(DeadlineError):
        await ensemble.infer(request(timeout_us=1))
    del server.models["triple"]
    with pytest.raises(NotReadyError, match=r"step 2 .'triple'. is not served now"):
        await ensemble.infer(request())


async def test_time_and_priority_reach_the_steps(server: Server) -> None:
    chain = step("double", "rows=in", "scaled=mid") + step("triple", "rows=mid", "scaled=out")
    ensemble = server.ensemble(chain).scheduler
    [out] = await ensemble.infer(request(timeout_us=10_000_000, priority=2))
    assert (out == ROWS * 6).all()
    first, second = (server.models[name].seen[0] for name in ("double", "triple"))  # type: ignore[attr-defined]
    assert 0 < second.timeout_us <= first.timeout_us < 10_000_000
    assert (first.priority, second.priority) == (2, 2)


async def test_ensembles_nest(server: Server) -> None:
    server.ensemble(step("double", "rows=in", "scaled=out"), name="inner")
    outer = server.ensemble(step("inner", "in=in", "out=mid") + step("inner", "in=mid", "out=out"), name="outer")
    outer.scheduler.check()
    [out] = await outer.scheduler.infer(request())
    assert (out == ROWS * 4).all()


async def test_a_cycle_of_ensembles_is_refused_when_it_is_loaded_and_when_it_came_later(server: Server) -> None:
    first = server.ensemble(step("double", "rows=in", "scaled=out"), name="first")
    second = server.ensemble(step("first", "in=in", "out=out"), name="second")
    second.scheduler.check()
    first = server.ensemble(step("second", "in=in", "out=out"), name="first")
    with pytest.raises(WrongStateError, match="part of itself: first → second → first"):
        first.scheduler.check()
    with pytest.raises(WrongStateError, match=r"part of itself: .*second.* → .*first.* → .*second"):
        await second.scheduler.infer(request())
    with pytest.raises(WrongStateError, match="part of itself: own → own"):
        server.ensemble(step("own", "in=in", "out=out"), name="own").scheduler.check()


async def test_rows_of_an_ensemble_without_batches_are_its_first_axis(server: Server) -> None:
    ensemble = server.ensemble(step("double", "rows=in", "scaled=out"), batched=False).scheduler
    ensemble.check()
    [out] = await ensemble.infer(request(rows=np.ones((3, 4), np.float32)))
    assert out.shape == (3, 4)
    assert server.models["double"].seen[0].rows == 3  # type: ignore[attr-defined]
    with pytest.raises(PenstockError, match=r"step 0 .* takes 8 rows at most; it was given 9"):
        await ensemble.infer(request(rows=np.ones((9, 4), np.float32)))
    with pytest.raises(PenstockError, match="takes tensor 'in' as"):
        await ensemble.infer(request(rows=np.ones((3, 5), np.float32)))


async def test_errors_of_the_callers_keep_their_kind(server: Server) -> None:
    async def refuse(inference: Inference) -> list[Array]:
        raise InvalidFieldError.of("parameters[sequence_id]", "no")

    server.models["double"].infer = refuse  # type: ignore[method-assign]
    with pytest.raises(InvalidFieldError):
        await server.ensemble(step("double", "rows=in", "scaled=out")).scheduler.infer(request())
    assert server.statistics.failures == {"OTHER": 1}


@pytest.mark.parametrize(
    ("steps", "match"),
    [
        ("", "no steps"),
        (step("", "rows=in", "scaled=out"), "needs a model_name"),
        (step("double", "rows=in", ""), "needs a model_name and an output_map"),
        (step("double", "rows=in", "scaled=in"), "step 0 .'double'. makes tensor 'in', which is an input"),
        (
            step("double", "rows=in", "scaled=out") * 2,
            "step 1 .'double'. makes tensor 'out', which step 0 .'double'. m",
        ),
        (step("double", "rows=none", "scaled=out"), "no step makes tensor 'none', which step 0 .'double'. takes"),
        (step("double", "rows=in", "scaled=other"), "no step makes tensor 'out', an output"),
        (
            step("double", "rows=a", "scaled=b") + step("double", "rows=b", "scaled=a total=out"),
            "step 0 .'double'., step 1 .'double'. wait for one another in a cycle, for a, b",
        ),
        (step("none", "rows=in", "scaled=out"), "step 0 .'none'.: There is no model 'none'"),
        (step("double", "rows=in", "scaled=out", 9), "step 0 .'double'.: There is no model"),
        (step("double", "in=in", "scaled=out"), "step 0 .'double'. maps input 'in'; the model has rows"),
        (step("double", "rows=in", "out=out"), "step 0 .'double'. maps output 'out'; the model has scaled, total"),
        (step("add", "left=in", "sum=out"), "step 0 .'add'. maps no tensor to the model's input 'right'"),
        (step("double", "rows=in", "total=out"), r"output is 'out: FP32 \[batch, 4\]'; step 0 .* gives it as 'total"),
        (
            step("double", "rows=in", "total=one") + step("double", "rows=one", "scaled=out"),
            r"step 1 .'double'. takes tensor 'one' as 'rows: .*'; step 0 .* gives it as 'total: FP32 \[batch, 1\]'",
        ),
        (step("whole", "rows=in", "scaled=out"), r"takes tensor 'in' as 'rows: INT32.*; the ensemble gives it as"),
        (step("small", "rows=in", "scaled=out"), "max_batch_size of 8, and the model of step 0 .'small'. 4"),
    ],
)
async def test_a_graph_that_does_not_fit_is_refused_when_it_is_loaded(server: Server, steps: str, match: str) -> None:
    axes: list[int | str] = ["batch", 4]
    whole = bundle_of(
        [helper.make_node("Cast", ["rows"], ["scaled"], to=1)],
        [value("rows", "INT32", axes)],
        [value("scaled", "FP32", axes)],
    )
    server.models |= {"whole": Model.of(whole), "small": Model.of(scale(2), max_batch_size=4)}
    with pytest.raises(WrongStateError, match=match):
        server.ensemble(steps).scheduler.check()
