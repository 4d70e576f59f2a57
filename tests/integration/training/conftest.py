"""What the tests of the training service share."""

import pytest
from tests.integration.training.hand import Hands


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    """Workers that the test plays: the service starts no process."""
    made = Hands()
    monkeypatch.setattr("penstock.training.jobs.scheduler.worker_process", made.worker_process)
    return made
