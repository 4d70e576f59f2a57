"""Real model.py files, on the batcher, in sequences, and one request at a time with any number of answers."""

import asyncio
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import text_format

from penstock.inference.batch_options import BatchOptions
from penstock.inference.batcher import Batcher
from penstock.inference.inference import Inference, SequenceStep
from penstock.inference.instance import Instance
from penstock.inference.model_config import declared_signature
from penstock.inference.opening import ModelFiles
from penstock.inference.python_model import PythonEngine, open_python_model, plain
from penstock.inference.python_scheduler import PythonScheduler, StreamLimits
from penstock.inference.sequences import SequenceLimits, SequenceScheduler
from penstock.inference.signature import Signature
from penstock.inference.statistics import Statistics
from penstock.inference.tensors import Array
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import DeadlineError, NotReadyError, PenstockError, UnimplementedError, WrongStateError

CONFIG = """
    name: "py" backend: "python" max_batch_size: %d
    input { name: "x" data_type: TYPE_FP32 dims: [2] }
    output { name: "y" data_type: TYPE_FP32 dims: [2] }
    output { name: "text" data_type: TYPE_STRING dims: [1] }
    parameters { key: "factor" value { string_value: "3" } }
    instance_group { count: 1 }
"""
DECOUPLED = "model_transaction_policy { decoupled: true }"
SCALE = """
    import numpy as np

    class Model:
        def __init__(self, config):
            self.factor = float(config["parameters"]["factor"]["string_value"])

        def infer(self, inputs, parameters):
            return {"y": inputs["x"] * np.float32(self.factor * parameters.get("times", 1))}
"""
# `stop` raises at that answer; `progress` counts how far the generator came.
COUNT = """
    import numpy as np

    progress = []
    closed = []

    class Model:
        def __init__(self, config):
            self.closed = False

        def infer(self, inputs, parameters):
            try:
                for number in range(int(inputs["x"][0])):
                    progress.append(number)
                    if number == parameters.get("fail", -1):
                        raise ValueError("too far")
                    yield {"y": np.full(2, number, np.float32)}
            finally:
                closed.append("generator")

        def close(self):
            closed.append("model")
"""


def engines(folder: Path, source: str, *, size: int = 0, more: str = "", trusted: bool = True) -> list[PythonEngine]:
    (folder / "model.py").write_text(textwrap.dedent(source))
    config = text_format.Parse(CONFIG % size + more, ModelConfig())
    files = ModelFiles("py", 1, folder, config, None, {})
    return open_python_model(files, config, declared_signature(config), trusted=trusted)


def request(x: float = 1, *, size: int = 0, output: str = "y", **parameters: int) -> Inference:
    shape = (size, 2) if size else (2,)
    return Inference({"x": np.full(shape, x, np.float32)}, (output,), size or 1, parameters=parameters)


def scheduler(given: list[PythonEngine], **limits: float) -> PythonScheduler:
    options = {"max_queue_size": 100, **limits}
    return PythonScheduler("Model 'py' version 1", given, StreamLimits(**options), Statistics())  # type: ignore[arg-type]


def loaded() -> set[str]:
    """Modules of models."""
    return {name for name in sys.modules if name.startswith("_penstock_python_model_")}


def giving(result: str) -> str:
    """A model that gives the value of an expression."""
    return f"""
        import numpy as np

        class Model:
            def __init__(self, config):
                pass

            def infer(self, inputs, parameters):
                return {result}
    """


def module_of(engine: PythonEngine) -> object:
    return sys.modules[type(engine._model).__module__]


async def until(condition: str, module: object) -> None:
    """Returns when a condition on the model's module holds."""
    async with asyncio.timeout(10):
        while not eval(condition, vars(module)):  # noqa: ASYNC110  # the model's thread knows no event loop
            await asyncio.sleep(0.002)


async def test_a_model_answers_with_its_configuration_and_the_callers_parameters(tmp_path: Path) -> None:
    served = scheduler(engines(tmp_path, SCALE))
    [y] = await served.infer(request(2, times=5))
    assert y.tolist() == [30, 30]
    assert [answers[0].tolist() async for answers in served.stream(request())] == [[3, 3]]
    await served.close()
    with pytest.raises(NotReadyError, match="unloaded"):
        await served.infer(request())


def test_a_batch_is_one_call(tmp_path: Path) -> None:
    [engine] = engines(tmp_path, SCALE, size=8)
    [y] = engine.run({"x": np.ones((5, 2), np.float32)}, ["y"])
    assert y.shape == (5, 2)
    engine.close()


async def test_requests_share_a_call_on_the_batcher_and_only_the_one_at_fault_fails(tmp_path: Path) -> None:
    source = """
        calls = []

        class Model:
            def __init__(self, config):
                pass

            def infer(self, inputs, parameters):
                calls.append(len(inputs["x"]))
                if (inputs["x"] == 13).any():
                    raise ValueError("thirteen")
                return {"y": inputs["x"]}
    """
    [engine] = engines(tmp_path, source, size=8, more="dynamic_batching {}")
    module = module_of(engine)
    config = text_format.Parse(CONFIG % 8 + "dynamic_batching {}", ModelConfig())
    signature = declared_signature(config)
    instance = Instance(engine, signature, None, 0)
    batcher = Batcher("m", [instance], signature, BatchOptions.of(config, 100), Statistics())
    given = [batcher.infer(request(x, size=1)) for x in (1, 2, 13, 4)]
    one, two, bad, four = await asyncio.gather(*given, return_exceptions=True)
    assert [answer[0][0, 0] for answer in (one, two, four) if isinstance(answer, list)] == [1, 2, 4]
    assert isinstance(bad, PenstockError)
    assert module.calls == [4, 1, 1, 1, 1]  # type: ignore[attr-defined]
    await batcher.close()


def test_reloading_gives_the_new_code_and_closing_forgets_it(tmp_path: Path) -> None:
    helper = "from .helper import FACTOR\n" + textwrap.dedent(SCALE).replace("self.factor *", "FACTOR *")
    (tmp_path / "helper.py").write_text("FACTOR = 7")
    before = loaded()
    [old] = engines(tmp_path, helper)
    [new] = engines(tmp_path, SCALE.replace("self.factor *", "self.factoR *").replace("self.factor =", "self.factoR ="))
    inputs = {"x": np.ones(2, np.float32)}
    assert (old.run(inputs, ["y"])[0][0], new.run(inputs, ["y"])[0][0]) == (7, 3)
    assert len(loaded() - before) == 3
    old.close()
    new.close()
    assert loaded() == before


def test_each_instance_is_an_object_of_its_own(tmp_path: Path) -> None:
    given = engines(tmp_path, SCALE, more="instance_group { count: 2 }")
    assert len({id(engine._model) for engine in given}) == 3
    assert len({type(engine._model) for engine in given}) == 1
    for engine in given:
        assert module_of(engine)
        engine.close()


def test_code_that_is_not_the_operators_is_not_run(tmp_path: Path) -> None:
    with pytest.raises(WrongStateError, match="only from this server's own model repository"):
        engines(tmp_path, "raise SystemExit", trusted=False)


@pytest.mark.parametrize(
    ("source", "match"),
    [
        ("raise SystemExit(3)", r"model.py could not be loaded raised SystemExit: 3"),
        ("import", "could not be loaded raised SyntaxError"),
        ("x = 1", "to define class Model with a method infer"),
        ("class Model: infer = 3", "to define class Model with a method infer"),
        (
            "class Model:\n    def __init__(self, config): raise KeyError('a')\n    def infer(self): pass",
            r"Model\(config\) raised KeyError: 'a'",
        ),
    ],
)
def test_a_file_that_cannot_be_served_says_why(tmp_path: Path, source: str, match: str) -> None:
    before = loaded()
    with pytest.raises(WrongStateError, match=match):
        engines(tmp_path, source)
    assert loaded() == before


@pytest.mark.parametrize("name", ["../model.py", "/etc/passwd", "..", "other.py", "__pycache__"])
def test_the_file_is_one_of_the_versions_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "__pycache__").mkdir()
    with pytest.raises(WrongStateError, match=r"no plain name|There is no file"):
        engines(tmp_path, SCALE, more=f'default_model_filename: "{name}"')


@pytest.mark.parametrize(
    ("result", "output", "match"),
    [
        ("[1]", "y", "a dict of arrays; got list"),
        ("({} for _ in ())", "y", "got generator. Set model_transaction_policy"),
        ("{'z': inputs['x']}", "y", "gave output 'z'; it declares y, text"),
        ("{}", "y", "did not give output 'y'"),
        ("{'y': [1.0, 2.0]}", "y", "a numpy array as output 'y'; got list"),
        ("{'y': inputs['x'].astype('f8')}", "y", r"expected output 'y: FP32 .*; got float64 \[3, 2\]"),
        ("{'y': inputs['x'][:, :1]}", "y", r"got float32 \[3, 1\]"),
        ("{'y': inputs['x'][:2]}", "y", r"for 3 rows; got float32 \[2, 2\]"),
        ("{'text': np.array([[1], [2], [3]], object)}", "text", "expected str or bytes in output 'text'; got int"),
        ("1 / 0", "y", "infer raised ZeroDivisionError: division by zero"),
        ("exec('raise SystemExit')", "y", "infer raised SystemExit"),
        ("next(iter(()))", "y", "infer raised StopIteration"),
        ("inputs['x'].fill(0)", "y", "infer raised ValueError: .*read-only"),
    ],
)
def test_what_a_model_gives_is_checked(tmp_path: Path, result: str, output: str, match: str) -> None:
    [engine] = engines(tmp_path, giving(result), size=8)
    x = np.ones((3, 2), np.float32)
    x.setflags(write=False)
    with pytest.raises(PenstockError, match=match) as caught:
        engine.run({"x": x}, [output])
    assert caught.value.message.startswith("Model 'py' version 1")
    assert "Traceback" not in caught.value.message
    engine.close()


@pytest.mark.parametrize("array", ["np.array(['é'])", "np.array([b'\\xc3\\xa9'], object)", "np.array(['é'], object)"])
def test_texts_come_as_any_array_of_texts(tmp_path: Path, array: str) -> None:
    [engine] = engines(tmp_path, giving(f"{{'text': {array}}}"))
    [text] = engine.run({"x": np.ones(2, np.float32)}, ["text"])
    assert (text.tolist(), text.dtype) == (["é"], np.dtype(object))
    engine.close()


def test_an_answer_is_no_buffer_of_the_models(tmp_path: Path) -> None:
    [engine] = engines(tmp_path, giving("{'y': inputs['x']}"))
    x = np.ones(2, np.float32)
    [y] = engine.run({"x": x}, ["y"])
    assert not np.shares_memory(x, y)
    engine.close()


def test_a_configuration_is_a_plain_dict() -> None:
    config = plain(text_format.Parse(CONFIG % 4 + "dynamic_batching { preferred_batch_size: [2, 4] }", ModelConfig()))
    assert config["input"][0]["dims"] == [2]
    assert config["input"][0]["data_type"] == "TYPE_FP32"
    assert config["dynamic_batching"]["preferred_batch_size"] == [2, 4]
    assert config["parameters"] == {"factor": {"string_value": "3"}}
    assert (config["max_batch_size"], config["backend"]) == (4, "python")
    assert "sequence_batching" not in config


async def test_a_decoupled_model_gives_any_number_of_answers(tmp_path: Path) -> None:
    served = scheduler(engines(tmp_path, COUNT, more=DECOUPLED))
    for count in (0, 1, 9):
        answers = [float(y[0]) async for [y] in served.stream(request(count))]
        assert answers == list(range(count))
    with pytest.raises(UnimplementedError, match="ModelInfer RPC doesn't support models with decoupled transaction"):
        await served.infer(request())
    assert served._statistics.success.count == 3
    await served.close()


async def test_a_generator_is_not_advanced_far_ahead_of_its_client(tmp_path: Path) -> None:
    [engine] = engines(tmp_path, COUNT, more=DECOUPLED)
    module = module_of(engine)
    served = scheduler([engine], ahead=3)
    stream = served.stream(request(100))
    await anext(stream)
    await until("len(progress) == 4", module)
    await asyncio.sleep(0.05)
    assert len(module.progress) == 4  # type: ignore[attr-defined]
    # A second request waits until the first client leaves.
    waiting = asyncio.create_task(anext(served.stream(request(1))))
    await asyncio.sleep(0)
    assert served.pending == 1
    await stream.aclose()  # type: ignore[attr-defined]
    [y] = await waiting
    assert y.tolist() == [0, 0]
    await until("len(closed) == 2", module)
    await served.close()
    assert module.closed == ["generator", "generator", "model"]  # type: ignore[attr-defined]
    assert served._statistics.failures == {"CANCELED": 1}


async def test_an_exception_ends_the_stream_after_the_answers_before_it(tmp_path: Path) -> None:
    served = scheduler(engines(tmp_path, COUNT, more=DECOUPLED))
    answers: list[list[Array]] = []
    with pytest.raises(PenstockError, match=r"^Model 'py' version 1: infer raised ValueError: too far$"):
        answers.extend([one async for one in served.stream(request(9, fail=2))])
    stream = served.stream(request(9, fail=2))
    assert [float((await anext(stream))[0][0]) for _ in range(2)] == [0, 1]
    with pytest.raises(PenstockError, match="too far"):
        await anext(stream)
    assert served._statistics.failures == {"BACKEND": 2}
    await served.close()


async def test_a_client_that_takes_nothing_is_cut_off(tmp_path: Path) -> None:
    [engine] = engines(tmp_path, COUNT, more=DECOUPLED)
    module = module_of(engine)
    served = scheduler([engine], ahead=1, stall_s=0.05)
    stream = served.stream(request(9))
    await anext(stream)
    await until("closed", module)
    await anext(stream)
    with pytest.raises(DeadlineError, match="no answer was taken"):
        await anext(stream)
    await served.close()


async def test_the_queue_is_bounded_and_who_waits_too_long_or_leaves_is_not_run(tmp_path: Path) -> None:
    [engine] = engines(tmp_path, COUNT, more=DECOUPLED)
    module = module_of(engine)
    served = scheduler([engine], max_queue_size=2, ahead=1)
    first = served.stream(request(9))
    await anext(first)
    late = request()
    late.timeout_us = 1000
    tasks = [asyncio.create_task(anext(served.stream(one))) for one in (late, request())]
    await asyncio.sleep(0)
    with pytest.raises(NotReadyError, match="waiting"):
        await anext(served.stream(request()))
    with pytest.raises(DeadlineError):
        await tasks[0]
    tasks[1].cancel()
    with pytest.raises(asyncio.CancelledError):
        await tasks[1]
    assert served.pending == 0
    closing = asyncio.create_task(served.close())
    assert len([one async for one in first]) == 8
    await closing
    assert module.closed == ["generator", "model"]  # type: ignore[attr-defined]
    assert served._statistics.failures == {"REJECTED": 2, "CANCELED": 1}


async def test_a_python_model_in_sequences(tmp_path: Path) -> None:
    source = """
        class Model:
            def __init__(self, config):
                pass

            def infer(self, inputs, parameters):
                total = inputs["past"] + inputs["x"]
                return {"y": total, "present": total}
    """
    more = """sequence_batching {
        control_input { name: "start" control { kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1] } }
        state { input_name: "past" output_name: "present" data_type: TYPE_FP32 dims: [2] } }"""
    [engine] = engines(tmp_path, source, size=4, more=more)
    config = text_format.Parse(CONFIG % 4 + more, ModelConfig())
    signature: Signature = declared_signature(config)
    served = SequenceScheduler("m", [engine], signature, config, SequenceLimits(10, 10), Statistics())
    totals = []
    for start in (True, False, False):
        inference = request(2, size=1)
        inference.sequence = SequenceStep("one", start, end=False)
        totals.append((await served.infer(inference))[0].tolist())
    assert totals == [[[2, 2]], [[4, 4]], [[6, 6]]]
    await served.close()
