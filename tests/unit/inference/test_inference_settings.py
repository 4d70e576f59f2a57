"""What the inference service refuses to be told, and what its workers make of it."""

from pathlib import Path

import pytest

from penstock.inference.settings import InferenceSettings
from penstock.rpc.errors import StartupError


@pytest.mark.parametrize("flags", [{"mode": "explicit"}, {"allow_client_shm": True}])
def test_several_workers_cannot_share_what_one_call_changes(tmp_path: Path, flags: dict[str, object]) -> None:
    with pytest.raises(StartupError, match="workers must be 1"):
        InferenceSettings.load({"home": tmp_path, "workers": 2, **flags})
    assert InferenceSettings.load({"home": tmp_path, **flags}).workers == 1


def test_each_worker_has_a_port_for_its_metrics(tmp_path: Path) -> None:
    settings = InferenceSettings.load({"home": tmp_path, "workers": 2, "metrics_port": 9000})
    assert [settings.of_worker(number).own_metrics_port for number in (0, 1)] == [9000, 9001]
    for port in (0, -1):
        free = InferenceSettings.load({"home": tmp_path, "workers": 2, "metrics_port": port})
        assert free.of_worker(1).own_metrics_port == port
