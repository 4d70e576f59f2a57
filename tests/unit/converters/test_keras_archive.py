"""Hostile `.keras` files. None of them needs Keras to be refused."""

import json
import stat
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest

from penstock.converters import UnsafeFileError, convert, keras_archive

DENSE = {"module": "keras.layers", "class_name": "Dense", "config": {"units": 2, "activation": "relu"}}


def model_of(*layers: object) -> dict[str, Any]:
    return {"module": "keras", "class_name": "Sequential", "config": {"name": "s", "layers": list(layers)}}


def write(path: Path, config: object, members: list[tuple[str | zipfile.ZipInfo, bytes]] | None = None) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive, warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # zipfile warns of the duplicate that we want
        archive.writestr("config.json", config if isinstance(config, str) else json.dumps(config))
        for name, content in members or []:
            archive.writestr(name, content)
    return path


def link(name: str) -> zipfile.ZipInfo:
    member = zipfile.ZipInfo(name)
    member.external_attr = (stat.S_IFLNK | 0o777) << 16
    return member


def custom(**changes: object) -> dict[str, Any]:
    return DENSE | changes


@pytest.mark.parametrize(
    ("rule", "members"),
    [
        ("absolute-name", [("/etc/passwd", b"")]),
        ("absolute-name", [("C:/windows", b"")]),
        ("parent-name", [("assets/../../x", b"")]),
        ("parent-name", [("..\\x", b"")]),
        ("no-links", [(link("assets/link"), b"/etc/passwd")]),
        ("duplicate-name", [("config.json", b"{}")]),
        ("duplicate-name", [("Config.JSON", b"{}")]),
        ("expansion", [("model.weights.h5", bytes(4 * 2**20))]),
    ],
)
def test_members(rule: str, members: list[tuple[str | zipfile.ZipInfo, bytes]], tmp_path: Path) -> None:
    path = write(tmp_path / "model.keras", model_of(DENSE), members)
    with pytest.raises(UnsafeFileError, match=f"rule: {rule}") as caught:
        convert(path, tmp_path / "model.onnx")
    assert caught.value.rule == rule
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("rule", "layer"),
    [
        ("no-code", custom(class_name="Lambda")),
        ("no-code", custom(class_name="TorchModuleWrapper")),
        ("no-code", custom(class_name="TFSMLayer")),
        ("no-code", custom(config={"activation": {"class_name": "__lambda__", "config": {"value": "x"}}})),
        ("no-code", custom(class_name="TimeDistributed", config={"layer": custom(class_name="Lambda")})),
        ("no-code", model_of(model_of(custom(class_name="Lambda")))),
        ("keras-classes-only", custom(module="os", class_name="System")),
        ("keras-classes-only", custom(module="kerasx.layers")),
        ("keras-classes-only", custom(module="keras.utils", class_name="Progbar")),
        ("keras-classes-only", custom(module="keras.layers", class_name="deserialize")),
        ("keras-classes-only", custom(module=None)),
        ("keras-classes-only", {"class_name": "Dense", "config": {}}),
        ("keras-classes-only", custom(class_name=["Dense"])),
        ("keras-classes-only", {"module": "posix", "class_name": "function", "config": "system"}),
        ("no-file-options", custom(class_name="StringLookup", config={"vocabulary": "/etc/passwd"})),
    ],
)
def test_configuration(rule: str, layer: object, tmp_path: Path) -> None:
    path = write(tmp_path / "model.keras", model_of(DENSE, layer))
    with pytest.raises(UnsafeFileError) as caught:
        convert(path, tmp_path / "model.onnx")
    assert caught.value.rule == rule
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("config", "rule"),
    [("[" * 100_000, "config"), ("{", "config"), ("[]", "config"), ("{}", "config"), ("\x00", "config")],
)
def test_broken_configuration(config: str, rule: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFileError) as caught:
        keras_archive.check_archive(write(tmp_path / "model.keras", config))
    assert caught.value.rule == rule


def test_no_configuration(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("metadata.json", "{}")
    with pytest.raises(UnsafeFileError, match=r"no config\.json"):
        keras_archive.check_archive(tmp_path / "model.keras")


def test_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "model.keras", model_of(DENSE), [("a", b"1"), ("b", b"2")])
    for limit, value, rule in (
        ("MAX_MEMBERS", 2, "member-count"),
        ("MAX_TOTAL_BYTES", 10, "total-size"),
        ("MAX_CONFIG_BYTES", 10, "config-size"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(keras_archive, limit, value)
            with pytest.raises(UnsafeFileError) as caught:
                keras_archive.check_archive(path)
        assert caught.value.rule == rule


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("model.h5", b"anything", "no-hdf5"),
        ("model.keras", b"\x89HDF\r\n\x1a\n rest", "no-hdf5"),
        ("model.keras", b"not a zip at all", "zip"),
        ("model.keras", b"", "zip"),
    ],
)
def test_other_files(name: str, content: bytes, rule: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UnsafeFileError) as caught:
        convert(tmp_path / name, tmp_path / "model.onnx")
    assert caught.value.rule == rule


def test_truncated_archive(tmp_path: Path) -> None:
    path = write(tmp_path / "model.keras", model_of(DENSE))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UnsafeFileError, match="rule: zip"):
        keras_archive.check_archive(path)


def test_a_loss_of_ones_own_is_no_danger(tmp_path: Path) -> None:
    config = model_of(DENSE) | {"compile_config": {"loss": {"module": "mine", "class_name": "Loss", "config": {}}}}
    keras_archive.check_archive(write(tmp_path / "model.keras", config))


def test_the_package_imports_nothing_heavy_and_refuses_before_it_does(tmp_path: Path) -> None:
    path = write(tmp_path / "model.keras", model_of(custom(class_name="Lambda")))
    program = f"""
import sys, penstock.converters as converters
heavy = {{"numpy", "onnx", "onnxruntime", "tensorflow", "keras", "tf2onnx"}}
assert not heavy & sys.modules.keys(), heavy & sys.modules.keys()
fenced = [name for name in sys.modules if name.startswith("penstock.") and not name.startswith("penstock.converters")]
assert not fenced, fenced
try:
    converters.convert({str(path)!r}, {str(tmp_path / "model.onnx")!r})
except converters.UnsafeFileError as error:
    print(error.rule, sorted({{"tensorflow", "keras"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["no-code", "[]"]
