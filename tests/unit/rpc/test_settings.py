"""Where a setting comes from, and what an operator is told about a wrong one."""

from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from penstock.rpc.config import MIB, ServerSettings
from penstock.rpc.errors import StartupError


class SampleSettings(ServerSettings):
    section = "sample"
    model_config = SettingsConfigDict(env_prefix="PENSTOCK_SAMPLE_", extra="forbid", frozen=True)

    port: Annotated[int, Field(ge=0, le=65535)] = 8042
    peers: tuple[int, ...] = ()


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("PENSTOCK_HOME", "PENSTOCK_CONFIG", "PENSTOCK_SAMPLE_PORT", "PENSTOCK_SAMPLE_HOME", "XDG_DATA_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))


@pytest.fixture
def config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    path = tmp_path / "penstock.toml"
    monkeypatch.setenv("PENSTOCK_CONFIG", str(path))
    return path


def test_flags_then_environment_then_file_then_default(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    config.write_text("")
    assert SampleSettings.load({}).port == 8042
    config.write_text("[sample]\nport = 1\n[other]\nport = 9\nunknown = 1\n")
    assert SampleSettings.load({}).port == 1
    monkeypatch.setenv("PENSTOCK_SAMPLE_PORT", "2")
    assert SampleSettings.load({}).port == 2
    assert SampleSettings.load({"port": 3}).port == 3


def test_the_home_of_every_source(monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path) -> None:
    config.write_text("")
    assert SampleSettings.load({}).home == tmp_path / ".local/share/penstock"
    monkeypatch.setenv("XDG_DATA_HOME", "relative")
    assert SampleSettings.load({}).home == tmp_path / ".local/share/penstock"
    monkeypatch.setenv("XDG_DATA_HOME", "/xdg")
    assert SampleSettings.load({}).home == Path("/xdg/penstock")
    config.write_text('[sample]\nhome = "/file"')
    assert SampleSettings.load({}).home == Path("/file")
    monkeypatch.setenv("PENSTOCK_HOME", "")
    assert SampleSettings.load({}).home == Path("/file")
    monkeypatch.setenv("PENSTOCK_HOME", "/all")
    assert SampleSettings.load({}).home == Path("/all")
    monkeypatch.setenv("PENSTOCK_SAMPLE_HOME", "/own")
    assert SampleSettings.load({}).home == Path("/own")
    loaded = SampleSettings.load({"home": "/flag"})
    assert (loaded.home, loaded.service_home) == (Path("/flag"), Path("/flag/sample"))


def test_an_unknown_key_is_refused_by_its_name(config: Path) -> None:
    config.write_text("[sample]\nprot = 1")
    with pytest.raises(StartupError, match=r"Wrong configuration of sample: there is no setting 'prot'\."):
        SampleSettings.load({})


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        ({"port": 70_000}, r"port: .*65535; got 70000"),
        ({"port": "many"}, r"port: .*integer.*; got 'many'"),
        ({"log_level": "loud"}, r"log_level: .*'debug'.*; got 'loud'"),
        ({"drain_s": -1, "max_message_mib": 0}, r"max_message_mib: .*; drain_s: "),
        ({"bogus": 1}, r"there is no setting 'bogus'"),
    ],
)
def test_wrong_values_are_all_named(flags: dict[str, object], named: str) -> None:
    with pytest.raises(StartupError, match=named):
        SampleSettings.load(flags)


@pytest.mark.parametrize("value", ["", "many", "-1"])
def test_a_wrong_variable_is_named(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv("PENSTOCK_SAMPLE_PORT", value)
    with pytest.raises(StartupError, match=rf"port: .*; got '{value}'"):
        SampleSettings.load({})


def test_a_variable_that_is_no_json_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PENSTOCK_SAMPLE_PEERS", "[1, 2")
    with pytest.raises(StartupError, match=r"Wrong configuration of sample: .*peers"):
        SampleSettings.load({})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"Cannot read the configuration file .*penstock\.toml: No such file"),
        (b"[sample", r"penstock\.toml is not TOML: "),
        (b"\xff\xfe", r"penstock\.toml is not TOML: "),
        (b"sample = 1", r"\[sample\] must be a table; got int"),
    ],
)
def test_a_configuration_file_that_cannot_be_read(config: Path, content: bytes | None, message: str) -> None:
    if content is not None:
        config.write_bytes(content)
    with pytest.raises(StartupError, match=message):
        SampleSettings.load({})


def test_every_setting_explains_itself() -> None:
    undocumented = [name for name, field in ServerSettings.model_fields.items() if not field.description]
    assert undocumented == []


def test_sizes_are_in_bytes() -> None:
    assert SampleSettings.load({"max_message_mib": 3}).max_message_bytes == 3 * MIB
