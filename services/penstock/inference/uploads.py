"""Models that clients upload with a load request, in a folder of the server's own. They are gone when it stops."""

import asyncio
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

from penstock.rpc.errors import InvalidFieldError, StorageFullError
from penstock.rpc.validation import FILE_NAME

# Only from the operator's own folder is code run, so none is taken: not even as a file beside a model.
_CODE = re.compile(r".*\.py[a-z]?", re.IGNORECASE)

_UPLOAD = re.compile(r"file:([1-9][0-9]{0,17})/(.+)")


class Uploads:
    """Owns the folder. Each upload of a model has a folder of its own: the one before may still be in use.

    Who keeps an upload says later whether it was adopted or discarded; only what is adopted is remembered.
    """

    def __init__(self, folder: Path) -> None:
        """What a crash left in `folder` is removed."""
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700, parents=True)
        self._folder = folder
        self._count = 0
        self._of_model: dict[str, Path] = {}

    def close(self) -> None:
        """Removes all uploads; none can be kept from now on. Blocks."""
        shutil.rmtree(self._folder, ignore_errors=True)

    async def keep(self, model: str, files: Mapping[str, bytes]) -> Path:
        """Writes the files of a model and returns the folder that has it, in the layout of a repository.

        Names are `file:<version>/<name>`. Raises `InvalidFieldError` for another one, `StorageFullError` if the disk
        has no room.
        """
        parsed = {key: _parsed(key) for key in files}
        self._count += 1
        root = self._folder / str(self._count)
        try:
            await asyncio.to_thread(_write, root, model, {parsed[key]: data for key, data in files.items()})
        except OSError as error:
            await self.discard(root)
            raise StorageFullError(f"The uploaded files of {model!r} cannot be kept: {error.strerror}.") from error
        return root

    async def adopt(self, model: str, root: Path | None) -> None:
        """An upload is the model's from now on, None: nothing uploaded is. What was before is removed."""
        older = self._of_model.pop(model, None)
        if root is not None:
            self._of_model[model] = root
        if older is not None:
            await self.discard(older)

    async def discard(self, root: Path) -> None:
        """Removes an upload that no model has adopted."""
        await asyncio.to_thread(shutil.rmtree, root, ignore_errors=True)


def _parsed(key: str) -> tuple[str, str]:
    match = _UPLOAD.fullmatch(key)
    if match is None or FILE_NAME.fullmatch(match[2]) is None:
        raise InvalidFieldError.of(
            f"parameters[{key[:80]}]", "expected 'file:<version>/<name>', a number and the plain name of a file"
        )
    if _CODE.fullmatch(match[2]):
        raise InvalidFieldError.of(
            f"parameters[{key[:80]}]", "expected no Python code: it is run only from the server's own model repository"
        )
    return match[1], match[2]


def _write(root: Path, model: str, files: Mapping[tuple[str, str], bytes]) -> None:
    # Without its parents: what is closed does not come back.
    root.mkdir()
    for (version, name), data in files.items():
        path = root / model / version / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
