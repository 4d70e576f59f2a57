"""Rows that a user gives in a file, `.npz` or `.parquet`."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray


def read_samples(path: Path) -> "Mapping[str, NDArray[Any]]":
    """An array for each input. Raises `InvalidSamplesError`."""
    return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_npz(path)


def _read_npz(path: Path) -> Mapping[str, "NDArray[Any]"]:
    import zipfile

    import numpy as np

    from penstock.converters import InvalidSamplesError

    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    # A single array, as in a .npy, is no context: TypeError.
    except (OSError, ValueError, AttributeError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise InvalidSamplesError(
            f"Cannot read the samples {path}: {error}. Write them with numpy.savez: numbers only, an array for each "
            "input."
        ) from error


def _read_parquet(path: Path) -> Mapping[str, "NDArray[Any]"]:
    """A column is an input; one whose cells are lists has their items along the second axis."""
    import numpy as np

    from penstock.converters import InvalidSamplesError

    try:
        from pyarrow import ArrowException, parquet
    except ModuleNotFoundError as error:
        raise InvalidSamplesError(
            f"Cannot read the samples {path}: .parquet needs pyarrow. pip install pyarrow, or give an .npz file."
        ) from error
    try:
        table = parquet.read_table(path)
        return {name: np.asarray(table[name].to_pylist()) for name in table.column_names}
    except (OSError, ValueError, ArrowException) as error:
        raise InvalidSamplesError(
            f"Cannot read the samples {path}: {error}. Write a column for each input, with lists of one length in it."
        ) from error
