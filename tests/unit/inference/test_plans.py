"""A request that is answered by plan gets the answer that it would get the long way."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.inference.inference import Inference
from penstock.inference.plans import Plans
from penstock.inference.request import RequestReader
from penstock.inference.response import ResponseWriter
from penstock.inference.signature import Signature, Tensor
from penstock.inference.tensors import DATATYPES
from penstock.inference.wire import read_infer_request
from penstock.oip import inference_pb2 as pb

FP32 = DATATYPES["FP32"]
SIGNATURE = Signature.made(
    [Tensor("rows", FP32, ("batch", 3))], [Tensor("a", FP32, ("batch", 3)), Tensor("b", FP32, ("batch",))]
)


def unused(*_: object) -> Any:
    raise AssertionError("there is no shared memory here")


VERSION: Any = SimpleNamespace(number=7, signature=SIGNATURE, labels={})
READER = RequestReader("m", SIGNATURE, 8, unused)


def message(rows: np.ndarray, *outputs: str) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="m", raw_input_contents=[rows.tobytes()])
    request.inputs.add(name="rows", datatype="FP32", shape=rows.shape)
    for name in outputs:
        request.outputs.add(name=name)
    return request


def learned(request: pb.ModelInferRequest) -> Plans:
    plans, data = Plans(), request.SerializeToString()
    read = read_infer_request(data)
    plans.learn(data, read, VERSION, READER.read(read))
    return plans


def same(one: Inference, other: Inference) -> bool:
    return (one.outputs, one.rows, list(one.inputs)) == (other.outputs, other.rows, list(other.inputs)) and all(
        one.inputs[name].tobytes() == other.inputs[name].tobytes() for name in one.inputs
    )


@given(
    first=st.integers(0, 4),
    second=st.integers(0, 4),
    outputs=st.sampled_from([(), ("a",), ("b", "a")]),
    seed=st.integers(0, 2**32 - 1),
)
def test_by_plan_or_not_is_the_same(first: int, second: int, outputs: tuple[str, ...], seed: int) -> None:
    random = np.random.default_rng(seed)
    plans = learned(message(random.random((first, 3), np.float32), *outputs))
    data = message(random.random((second, 3), np.float32), *outputs).SerializeToString()
    plan = plans.find(data)
    assert (plan is not None) == (first == second)
    if plan is None:
        return
    read = read_infer_request(data)
    inference = READER.read(read)
    assert same(plan.read(data), inference)
    answers = {"a": random.random((second, 3), np.float32), "b": random.random(second, np.float32)}
    arrays = [answers[name] for name in inference.outputs]
    written = b"".join(ResponseWriter(unused).write(read.message, VERSION, inference, arrays))
    assert pb.ModelInferResponse.FromString(plan.write(arrays)) == pb.ModelInferResponse.FromString(written)


ODD = {
    "an id": lambda request: setattr(request, "id", "mine"),
    "a parameter": lambda request: setattr(request.parameters["x"], "bool_param", True),
    "a parameter of the input": lambda request: setattr(request.inputs[0].parameters["x"], "bool_param", True),
    "a classified output": lambda request: setattr(
        request.outputs.add(name="a").parameters["classification"], "int64_param", 1
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_no_plan_is_made_for_a_request_that_says_more(case: str) -> None:
    request = message(np.ones((1, 3), np.float32))
    ODD[case](request)
    assert learned(request).find(request.SerializeToString()) is None


def test_no_plan_is_made_where_the_raw_contents_do_not_come_last() -> None:
    request = message(np.ones((1, 3), np.float32))
    whole, raw = request.SerializeToString(), bytes([7 << 3 | 2, 12]) + request.raw_input_contents[0]
    data = raw + whole.removesuffix(raw)
    plans, read = Plans(), read_infer_request(data)
    assert read.message == request
    plans.learn(data, read, VERSION, READER.read(read))
    assert plans.find(data) is None


def test_plans_are_bounded() -> None:
    plans = Plans()
    for number in range(2000):
        request = message(np.ones((1, 3), np.float32))
        request.model_name = f"{number:0{1 + number % 600}}"
        data = request.SerializeToString()
        read = read_infer_request(data)
        plans.learn(data, read, VERSION, READER.read(read))
    assert sum(map(len, plans._by_length.values())) <= 256 * 8
