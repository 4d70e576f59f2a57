"""A service's home: one folder, one process at a time."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from penstock.rpc.errors import StartupError


@contextmanager
def locked_home(path: Path) -> Iterator[Path]:
    """Creates the folder, for its owner alone, and holds it until the block ends.

    The lock is the kernel's, so a killed process leaves none behind. Raises `StartupError` if another process holds it
    or the folder cannot be written.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise _unusable(path, error) from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        except BlockingIOError:
            holder = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            raise StartupError(
                f"The home {path} is in use by process {holder}. Stop that server, or choose another home with --home."
            ) from None
        except OSError as error:
            raise _unusable(path, error) from error
        yield path
    finally:
        os.close(lock)


def _unusable(path: Path, error: OSError) -> StartupError:
    return StartupError(f"Cannot use the home {path}: {error.strerror}. Choose another with --home.")
