"""A folder of models: which there are, which versions of them are served, and when they have changed."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from google.protobuf import text_format

from penstock.inference.folder import is_name, model_names, read_labels, read_model
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import WrongStateError

ENSEMBLE = "platform: 'ensemble' ensemble_scheduling { step { model_name: 'part' } }"


def put(root: Path, *versions: str, config: str | None = None) -> Path:
    """A model `m` with these folders of versions."""
    folder = root / "m"
    folder.mkdir()
    for version in versions:
        (folder / version).mkdir()
        (folder / version / "model.onnx").write_bytes(b"graph")
    if config is not None:
        (folder / "config.pbtxt").write_text(config)
    return folder


@pytest.mark.parametrize(
    ("config", "numbers"),
    [
        (None, [10]),
        ("", [10]),
        ("name: 'm'", [10]),
        ("version_policy { latest { } }", [10]),
        ("version_policy { latest { num_versions: 2 } }", [2, 10]),
        ("version_policy { latest { num_versions: 9 } }", [1, 2, 10]),
        ("version_policy { all { } }", [1, 2, 10]),
        ("version_policy { specific { versions: [2, 1, 2] } }", [1, 2]),
    ],
)
def test_the_version_policy_chooses_the_versions(tmp_path: Path, config: str | None, numbers: list[int]) -> None:
    put(tmp_path, "1", "2", "10", "03", "0", "x", ".4", "-5", config=config)
    read = read_model(tmp_path, "m")
    assert ([one.number for one in read.versions], read.problem) == (numbers, "")
    assert [one.folder for one in read.versions] == [tmp_path / "m" / str(number) for number in numbers]


@pytest.mark.parametrize(
    ("versions", "config", "problem"),
    [
        ([], None, "Model 'm' has no version"),
        (["x"], "", "Model 'm' has no version"),
        (["1"], "version_policy { specific { versions: [1, 3] } }", "names version 3, which has no folder"),
        (["1"], "version_policy { specific { } }", "Model 'm' has no version"),
        (["1"], "name: 'other'", "says that its name is 'other'"),
        (["1"], "max_batch_size: 'a'", "config.pbtxt is no model configuration: 1:17 : "),
        ([], "backend: 'tensorrt'", "asks for backend 'tensorrt'"),
    ],
)
def test_what_cannot_be_served_says_why(tmp_path: Path, versions: list[str], config: str | None, problem: str) -> None:
    put(tmp_path, *versions, config=config)
    read = read_model(tmp_path, "m")
    assert (problem in read.problem, list(read.versions)) == (True, [])


def test_a_folder_that_cannot_be_read_is_a_problem_and_no_error(tmp_path: Path) -> None:
    assert "cannot be read" in read_model(tmp_path, "nobody").problem
    (put(tmp_path, "1") / "config.pbtxt").write_bytes(b"\xff")
    assert "cannot be read" in read_model(tmp_path, "m").problem


def test_an_ensemble_needs_no_folder_of_a_version(tmp_path: Path) -> None:
    put(tmp_path, config=ENSEMBLE)
    (version,) = read_model(tmp_path, "m").versions
    assert version.number == 1


def test_an_override_takes_the_place_of_the_configuration(tmp_path: Path) -> None:
    put(tmp_path, "1", "2", config="not a configuration")
    read = read_model(tmp_path, "m", text_format.Parse("version_policy { all { } }", ModelConfig()))
    assert [one.number for one in read.versions] == [1, 2]


def test_models_are_the_folders_that_are_not_hidden(tmp_path: Path) -> None:
    for name in ("b", "a", ".git", "a b"):
        (tmp_path / name).mkdir()
    (tmp_path / "file").touch()
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff")).mkdir()
    assert model_names(tmp_path) == ["a", "a b", "b"]


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("m", True),
        ("m-1.2_ä", True),
        ("x" * 200, True),
        ("x" * 201, False),
        ("ä" * 101, False),
        ("", False),
        (".", False),
        ("..", False),
        (".hidden", False),
        ("a/b", False),
        ("/a", False),
        ("a\0", False),
        ("\udcff", False),
    ],
    ids=lambda value: ascii(value)[:20],
)
def test_a_name_is_the_plain_name_of_a_folder(name: str, plain: bool) -> None:
    assert is_name(name) is plain


def write(path: str, data: bytes = b"other bytes") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(data)

    return change


@pytest.mark.parametrize(
    ("change", "differs"),
    [
        (write("1/model.onnx"), True),
        (write("1/weights.bin"), True),
        (write("1/model.parts/part"), True),
        (write("config.pbtxt", b"max_batch_size: 3"), True),
        (write("classes.txt"), True),
        (write("initial_state/zeros"), True),
        (lambda folder: (folder / "1" / "model.onnx").unlink(), True),
        (lambda folder: os.utime(folder / "1" / "model.onnx", ns=(1, 1)), True),
        (lambda folder: None, False),
        (write("1/__pycache__/model.cpython-311.pyc"), False),
        (write("1/package/__pycache__/part.pyc"), False),
        (write("1/.model.onnx.swp"), False),
        (write("2.txt/.hidden"), False),
        (write("config.pbtxt", b"# The same."), False),
    ],
)
def test_the_digest_changes_with_what_is_served(tmp_path: Path, change: Callable[[Path], None], differs: bool) -> None:
    folder = put(tmp_path, "1", config="")
    (before,) = read_model(tmp_path, "m").versions
    change(folder)
    (after,) = read_model(tmp_path, "m").versions
    assert (before.digest != after.digest) is differs


def test_a_version_does_not_change_with_the_one_beside_it(tmp_path: Path) -> None:
    folder = put(tmp_path, "1", "2", config="version_policy { all { } }")
    before = [one.digest for one in read_model(tmp_path, "m").versions]
    write("2/model.onnx")(folder)
    after = [one.digest for one in read_model(tmp_path, "m").versions]
    assert [one != other for one, other in zip(before, after, strict=True)] == [False, True]


def labelled(root: Path, file: str) -> dict[str, list[str]]:
    put(root, "1", config=f"output {{ name: 'scores' label_filename: '{file}' }} output {{ name: 'plain' }}")
    (root / "m" / "classes.txt").write_text("cat\ndog\n")
    (root / "secret").write_text("secret")
    (version,) = read_model(root, "m").versions
    return {name: list(labels) for name, labels in read_labels(version).items()}


def test_labels_lie_beside_the_configuration(tmp_path: Path) -> None:
    assert labelled(tmp_path, "classes.txt") == {"scores": ["cat", "dog"]}


@pytest.mark.parametrize("file", ["../secret", "/etc/passwd", "1/model.onnx", "..", ".hidden", "nobody", "1"])
def test_labels_lie_nowhere_else(tmp_path: Path, file: str) -> None:
    with pytest.raises(WrongStateError, match=r"is no plain name|cannot be read"):
        labelled(tmp_path, file)
