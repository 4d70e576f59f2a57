"""The demo, as a new user runs it."""

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from tests.e2e.conftest import PENSTOCK

from penstock.api.training.v1.job_pb2 import Job
from penstock.cli.demo.answers import Served
from penstock.cli.demo.command import Outcome

PNG = b"\x89PNG\r\n\x1a\n"


def test_the_whole_way_from_rows_to_answers(tmp_path: Path):
    command = [PENSTOCK, "demo", "--json", "--output", tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=170)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["passed"]
    assert figures["test_rows"] == 269
    assert figures["accuracy_over_the_wire"] == figures["accuracy_of_keras"] >= 0.95
    assert figures["classes_that_differ"] == 0
    assert figures["largest_difference_of_a_probability"] < 1e-5
    assert set(figures["latency_ms"]) == {"penstock", "tritonclient"}
    assert [Path(picture).read_bytes()[:8] for picture in figures["pictures"]] == [PNG, PNG]


CERTAIN = np.eye(10, dtype=np.float32)
UNSURE = np.full((10, 10), 0.1, np.float32)


def outcome(served: np.ndarray, keras: np.ndarray, digits: np.ndarray) -> Outcome:
    clients = (Served("one", CERTAIN, np.ones(10)), Served("other", served, np.ones(10)))
    return Outcome(Job(), digits, keras, clients, 1.0)


@pytest.mark.parametrize(
    ("served", "keras", "right", "passed"),
    [
        (CERTAIN, CERTAIN, 10, True),
        (CERTAIN, CERTAIN, 9, False),
        (UNSURE, CERTAIN, 10, False),
        (CERTAIN, UNSURE, 10, False),
    ],
    ids=["all as it should be", "under 0.95", "one client differs from Keras", "all clients differ from Keras"],
)
def test_it_passes_only_if_accurate_and_equal_to_keras(served: np.ndarray, keras: np.ndarray, right: int, passed: bool):
    digits = np.where(np.arange(10) < right, np.arange(10), 0)
    assert outcome(served, keras, digits).passed is passed
