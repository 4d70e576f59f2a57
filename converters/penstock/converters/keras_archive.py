"""Reads a `.keras` file as if an attacker had written it, before Keras sees it.

The rules follow what a `.keras` archive written by Keras 3 contains; everything else is refused, by name.
"""

import json
import re
import stat
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from penstock.converters.errors import UnsafeFileError

MAX_MEMBERS = 10_000
MAX_TOTAL_BYTES = 16 * 2**30
MAX_CONFIG_BYTES = 64 * 2**20
MAX_EXPANSION = 100
_EXPANSION_FLOOR_BYTES = 2**20  # text compresses well; a bomb must be large to hurt

_HDF5_MAGIC = b"\x89HDF\r\n\x1a\n"

_CODE_CLASSES = frozenset(
    {"Lambda", "TorchModuleWrapper", "TFSMLayer", "JaxLayer", "FlaxLayer", "__lambda__", "__typespec__"}
)
_PLAIN_CLASSES = frozenset({"__tensor__", "__numpy__", "__bytes__", "__slice__", "__ellipsis__", "__keras_tensor__"})
_MODULE = re.compile(
    r"keras(\.src)?(\.(activations|constraints|dtype_policies|initializers|layers|losses|metrics|models|ops|optimizers"
    r"|quantizers|random|regularizers)(\.\w+)*)?"
)
# Layer options that Keras takes as the path of a file to read when they are strings.
_FILE_OPTIONS = frozenset({"vocabulary", "idf_weights"})


def check_archive(path: Path) -> None:
    """Returns if the file may be given to Keras. Raises `UnsafeFileError`, or `OSError` if the file cannot be read."""
    with path.open("rb") as file:
        if file.read(len(_HDF5_MAGIC)) == _HDF5_MAGIC or path.suffix.lower() in {".h5", ".hdf5"}:
            raise UnsafeFileError(
                "no-hdf5",
                f"{path} is an HDF5 model, a format that can carry code. Save it as .keras where it was trained.",
            )
        try:
            with zipfile.ZipFile(file) as archive:
                _check_members(path, archive.infolist())
                config = _read_config(path, archive)
        except (zipfile.BadZipFile, NotImplementedError, EOFError) as error:
            raise UnsafeFileError(
                "zip", f"{path} is not a .keras archive: {error}. Save the model with Keras 3."
            ) from error
    # Keras is asked not to compile, so this part is never read: a model with a loss of its own still converts.
    config.pop("compile_config", None)
    for where, item in _objects(config):
        _check_object(path, where, item)


def _check_members(path: Path, members: list[zipfile.ZipInfo]) -> None:
    if len(members) > MAX_MEMBERS:
        raise UnsafeFileError("member-count", f"{path} has {len(members):,} members; at most {MAX_MEMBERS:,} are read.")
    total = sum(member.file_size for member in members)
    if total > MAX_TOTAL_BYTES:
        raise UnsafeFileError("total-size", f"{path} unpacks to {total:,} bytes; at most {MAX_TOTAL_BYTES:,} are read.")
    seen: set[str] = set()
    for member in members:
        name = member.filename
        if name.startswith("/") or re.match(r"[A-Za-z]:", name):
            raise UnsafeFileError("absolute-name", f"{path} has a member with the absolute name {name!r}.")
        if "\\" in name or ".." in PurePosixPath(name).parts:
            raise UnsafeFileError("parent-name", f"{path} has a member whose name {name!r} leaves the archive.")
        if stat.S_IFMT(member.external_attr >> 16) not in {0, stat.S_IFREG, stat.S_IFDIR}:
            raise UnsafeFileError("no-links", f"{path} has a member {name!r} that is neither a file nor a folder.")
        # Some file systems see no difference between `A` and `a`.
        if (key := str(PurePosixPath(name)).casefold()) in seen:
            raise UnsafeFileError("duplicate-name", f"{path} has more than one member {name!r}.")
        seen.add(key)
        if member.file_size > max(_EXPANSION_FLOOR_BYTES, MAX_EXPANSION * member.compress_size):
            raise UnsafeFileError(
                "expansion",
                f"{path} has a member {name!r} that grows from {member.compress_size:,} to {member.file_size:,} bytes; "
                f"a member may grow {MAX_EXPANSION}-fold.",
            )


def _read_config(path: Path, archive: zipfile.ZipFile) -> dict[str, Any]:
    try:
        size = archive.getinfo("config.json").file_size
    except KeyError:
        raise UnsafeFileError("config", f"{path} has no config.json; it is not a .keras archive.") from None
    if size > MAX_CONFIG_BYTES:
        raise UnsafeFileError(
            "config-size", f"The config.json of {path} has {size:,} bytes; at most {MAX_CONFIG_BYTES:,} are read."
        )
    try:
        config = json.loads(archive.read("config.json"))
    except (ValueError, RecursionError, RuntimeError) as error:
        raise UnsafeFileError("config", f"The config.json of {path} cannot be read: {error}.") from error
    if not isinstance(config, dict) or "class_name" not in config:
        raise UnsafeFileError("config", f"The config.json of {path} does not describe a Keras 3 model.")
    return config


def _objects(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every JSON object with its place, nested ones too, without recursion: depth is the attacker's choice."""
    pending: list[tuple[str, Any]] = [("", config)]
    while pending:
        where, value = pending.pop()
        if isinstance(value, dict):
            yield where, value
            pending += [(f"{where}.{key}".lstrip("."), item) for key, item in value.items()]
        elif isinstance(value, list):
            pending += [(f"{where}[{index}]", item) for index, item in enumerate(value)]


def _check_object(path: Path, where: str, item: dict[str, Any]) -> None:
    for option in sorted(_FILE_OPTIONS & item.keys()):
        if isinstance(item[option], str):
            raise UnsafeFileError(
                "no-file-options",
                f"{path} asks to read the file {item[option]!r} ({where}.{option}). Save the model with the values in "
                "it.",
            )
    if "class_name" not in item:
        return
    name, place = str(item["class_name"]), where or "the model"
    if name in _CODE_CLASSES:
        raise UnsafeFileError(
            "no-code",
            f"{path} contains a {name} at {place}, which runs code from the file. Replace it by layers of Keras.",
        )
    if name in _PLAIN_CLASSES or (name == "function" and _is_keras_function(item)):
        return
    module = item.get("module")
    if not name[:1].isupper() or not isinstance(module, str) or not _MODULE.fullmatch(module):
        raise UnsafeFileError(
            "keras-classes-only",
            f"{path} contains {module}.{name} at {place}, which is not part of Keras. Rebuild the model from layers of "
            "Keras, or convert it live where its classes are defined.",
        )


def _is_keras_function(item: dict[str, Any]) -> bool:
    """Keras writes a function of its own with its module, or `builtins`, and its name as the configuration."""
    module, name = item.get("module"), item.get("config")
    if not isinstance(module, str) or not isinstance(name, str):
        return False
    return name.isidentifier() and (module == "builtins" or _MODULE.fullmatch(module) is not None)
