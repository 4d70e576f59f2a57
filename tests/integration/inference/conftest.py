"""The suite runs on each transport that can run here."""

import pytest
from tests.integration.rpc.conformance import TRANSPORTS


@pytest.fixture(scope="module", params=TRANSPORTS)
def transport(request: pytest.FixtureRequest) -> str:
    """What carries a test's calls; `fleet` starts the servers. Where envoy cannot run, its half is skipped."""
    return str(request.param)
