"""A folder of models in Triton's layout: `<model>/config.pbtxt` and `<model>/<version>/model.onnx`."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.inference.config_text import parse_known
from penstock.inference.model_config import ENSEMBLE, backend_of, model_file
from penstock.oip.model_config_pb2 import ModelConfig
from penstock.rpc.errors import WrongStateError

CONFIG = "config.pbtxt"
_VERSION = re.compile(r"[1-9][0-9]{0,17}")
_MAX_NAME = 200
_MAX_LABELS_BYTES = 2**24


@dataclass(frozen=True)
class FolderVersion:
    """One version in a folder. `digest` changes with its files and its configuration."""

    model: str
    number: int
    folder: Path
    config: ModelConfig
    digest: str
    # Whether it lies in the operator's own folder; what clients upload does not.
    trusted: bool


@dataclass(frozen=True)
class FolderModel:
    """A model's versions that are to be served, or why there are none."""

    name: str
    versions: Sequence[FolderVersion]
    problem: str = ""
    # Fields of its configuration that this server does not know.
    unknown: Sequence[str] = ()


def model_names(root: Path) -> list[str]:
    """The names of all models: every folder that is not hidden. Raises `OSError` if the folder cannot be read."""
    return sorted(path.name for path in root.iterdir() if is_name(path.name) and path.is_dir())


def is_name(name: str) -> bool:
    """Whether a model can be called that: a plain name of a folder."""
    try:
        size = len(name.encode())
    except UnicodeEncodeError:
        # A file's name that is no UTF-8: no client could ask for it, and no log line could tell of it.
        return False
    return 0 < size <= _MAX_NAME and not name.startswith(".") and "/" not in name and "\0" not in name


def read_model(root: Path, name: str, override: ModelConfig | None = None, *, trusted: bool = True) -> FolderModel:
    """One model of a folder. `override` takes the place of its own configuration. Blocks; raises nothing.

    `trusted`: the folder is the operator's own.
    """
    folder = root / name
    unknown: Sequence[str] = ()
    try:
        if override is None:
            config, unknown = _config(folder)
        else:
            config = override
            if trusted:
                _check_override(folder, override)
        versions = _read(folder, name, config, trusted)
    except WrongStateError as error:
        return FolderModel(name, (), error.message)
    except (OSError, UnicodeDecodeError) as error:
        return FolderModel(name, (), f"Model {name!r} cannot be read: {error}.")
    return FolderModel(name, versions, unknown=unknown)


def _read(folder: Path, name: str, config: ModelConfig, trusted: bool) -> list[FolderVersion]:
    if config.name not in ("", name):
        raise WrongStateError(f"The configuration of model {name!r} says that its name is {config.name[:80]!r}.")
    numbers = _chosen(config, _numbers(folder, config))
    if not numbers:
        raise WrongStateError(f"Model {name!r} has no version: no folder {folder.name}/1, for example.")
    return [_version(folder, name, number, config, trusted) for number in numbers]


def read_labels(version: FolderVersion) -> Mapping[str, Sequence[str]]:
    """The class names of outputs whose configuration names a file of them, one a line, in the model's folder.

    Raises `WrongStateError` for a file that is not there or not beside the configuration.
    """
    labels = {}
    for output in version.config.output:
        if not output.label_filename:
            continue
        if not is_name(output.label_filename):
            raise WrongStateError(f"label_filename {output.label_filename[:80]!r} of {output.name!r} is no plain name.")
        path = version.folder.parent / output.label_filename
        try:
            with path.open("rb") as file:
                text = file.read(_MAX_LABELS_BYTES).decode()
        except (OSError, UnicodeDecodeError) as error:
            raise WrongStateError(f"Labels of output {output.name!r} cannot be read: {error}.") from error
        labels[output.name] = text.splitlines()
    return labels


def needs(config: ModelConfig) -> frozenset[str]:
    """The models that an ensemble is made of."""
    return frozenset(step.model_name for step in config.ensemble_scheduling.step)


def _config(folder: Path) -> tuple[ModelConfig, Sequence[str]]:
    """A model's own configuration, and the fields of it that are not known."""
    path = folder / CONFIG
    if not path.exists():
        return ModelConfig(), ()
    return parse_known(path.read_text(encoding="utf-8"), str(path))


def _check_override(folder: Path, override: ModelConfig) -> None:
    """Raises `WrongStateError` for another backend or file than the operator's: clients do not choose what is run."""
    try:
        own, _ = _config(folder)
        allowed = backend_of(own), model_file(own)
    except (WrongStateError, UnicodeDecodeError):
        # It allows nothing of its own.
        allowed = backend_of(ModelConfig()), model_file(ModelConfig())
    asked = backend_of(override), model_file(override)
    if asked != allowed:
        raise WrongStateError(
            f"The given configuration asks for backend {asked[0]!r} and file {asked[1][:80]!r}; the model is one of "
            f"backend {allowed[0]!r} and file {allowed[1]!r}, which only its own {CONFIG} can change."
        )


def _numbers(folder: Path, config: ModelConfig) -> list[int]:
    numbers = sorted(int(path.name) for path in folder.iterdir() if _VERSION.fullmatch(path.name) and path.is_dir())
    # An ensemble has nothing to keep in its version's folder.
    return numbers or ([1] if backend_of(config) == ENSEMBLE else [])


def _chosen(config: ModelConfig, numbers: Sequence[int]) -> Sequence[int]:
    """What the version policy wants, the newest one by default."""
    policy = config.version_policy
    match policy.WhichOneof("policy_choice"):
        case "all":
            return numbers
        case "specific":
            if missing := sorted(set(policy.specific.versions) - set(numbers)):
                raise WrongStateError(f"version_policy names version {missing[0]}, which has no folder.")
            return sorted(set(policy.specific.versions))
    return numbers[-max(1, policy.latest.num_versions) :]


def _version(folder: Path, name: str, number: int, config: ModelConfig, trusted: bool) -> FolderVersion:
    digest = hashlib.sha256(config.SerializeToString(deterministic=True))
    version = folder / str(number)
    # What lies beside the versions is read with each of them: labels, states to begin with, inputs to warm up with.
    beside = [path for path in folder.iterdir() if path.name != CONFIG and not _VERSION.fullmatch(path.name)]
    for path, size, changed_ns in sorted(file for top in (version, *beside) for file in _files(top, folder)):
        digest.update(f"{path}\0{size}\0{changed_ns}\0".encode(errors="surrogateescape"))
    return FolderVersion(name, number, version, config, f"sha256:{digest.hexdigest()}", trusted)


def _files(top: Path, folder: Path) -> Iterator[tuple[str, int, int]]:
    """A file, or all below a folder: name, size and time of change. Not what Python and editors leave there."""
    for path in top.rglob("*") if top.is_dir() else (top,):
        name = path.relative_to(folder)
        if path.is_file() and not any(part == "__pycache__" or part.startswith(".") for part in name.parts):
            status = path.stat()
            yield str(name), status.st_size, status.st_mtime_ns
