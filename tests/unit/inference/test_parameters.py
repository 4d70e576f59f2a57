"""The parameters of requests that the protocol gives a meaning."""

import numpy as np
import pytest

from penstock.inference.inference import Inference, SequenceStep
from penstock.inference.parameters import RequestParameters
from penstock.oip import inference_pb2 as pb
from penstock.rpc.errors import InvalidFieldError


def step(sequence_id: str) -> SequenceStep | None:
    inference = Inference({"rows": np.ones((1, 4), np.float32)}, ("scaled",), 1)
    RequestParameters({"sequence_id": pb.InferParameter(string_param=sequence_id)}).apply(inference)
    return inference.sequence


def test_ids_of_sequences_that_differ_are_never_one_sequence() -> None:
    longest = "k" * 256
    assert step(longest) == SequenceStep(longest, start=False, end=False)
    for sequence_id in (f"{longest}A", f"{longest}B"):
        with pytest.raises(InvalidFieldError, match="expected 256 characters at most; got 257"):
            step(sequence_id)
