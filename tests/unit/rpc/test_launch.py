"""Which transport serves, and what Envoy is configured to."""

import importlib.util
from pathlib import Path

import pytest

from penstock.rpc import launch
from penstock.rpc.config import ServerSettings
from penstock.rpc.errors import StartupError


class SampleSettings(ServerSettings):
    section = "sample"


class ManySettings(ServerSettings):
    section = "many"
    allows_workers = True


def sample(**values: object) -> SampleSettings:
    return SampleSettings.load({"home": "/unused", **values})


@pytest.fixture
def without_pyvoy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("without_pyvoy")
def test_without_pyvoy_auto_is_grpcio_and_envoy_says_what_to_install():
    assert launch.chosen_transport(sample(transport="auto")) == "grpcio"
    with pytest.raises(StartupError, match=r"pip install pyvoy.*--transport grpcio"):
        launch.chosen_transport(sample(transport="envoy"))


def test_without_a_python_library_auto_is_grpcio_and_envoy_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    envoy = pytest.importorskip("penstock.rpc.envoy", reason="pyvoy has no wheel here")
    monkeypatch.setattr(envoy, "has_python_library", lambda: False)
    assert launch.chosen_transport(sample(transport="auto")) == "grpcio"
    with pytest.raises(StartupError, match=r"libpython3"):
        launch.chosen_transport(sample(transport="envoy"))


def test_grpcio_is_the_default():
    assert launch.chosen_transport(sample()) == "grpcio"


def test_a_service_whose_home_is_what_it_is_for_has_one_worker():
    with pytest.raises(StartupError, match="workers must be 1"):
        sample(workers=2)
    settings = ManySettings.load({"home": "/h", "workers": 2})
    assert settings.service_home == Path("/h/many")
    worker = settings.of_worker(1, Path("/run/x"))
    assert worker.service_home == Path("/h/many/worker-1")
    assert (settings.worker, worker.worker) == (None, 1)
    assert worker.worker_address(0) == "unix:/run/x/worker-0.sock"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tls_key": "/k"}, "tls_cert and tls_key belong together"),
        ({"tls_client_ca": "/k"}, "tls_client_ca needs tls_cert and tls_key"),
        ({"tls_cert": "/nowhere/c", "tls_key": "/nowhere/k"}, "Cannot read tls_cert, /nowhere/c: No such file"),
    ],
)
def test_wrong_tls_settings(values: dict[str, object], message: str):
    with pytest.raises(StartupError, match=message):
        sample(**values)


def test_envoy_keeps_its_admin_interface_to_its_owner():
    envoy = pytest.importorskip("penstock.rpc.envoy", reason="pyvoy has no wheel here")
    config = envoy.envoy_config(sample(), 8001, "/private/admin")
    assert config["admin"] == {"address": {"pipe": {"path": "/private/admin", "mode": 0o600}}}
