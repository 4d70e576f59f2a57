"""Memory that is free, given back to the machine."""

import ctypes
from collections.abc import Callable


def _trimmer() -> Callable[[int], int] | None:
    """Glibc's malloc_trim; other C libraries have none."""
    try:
        trim: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError):
        return None
    return trim


_trim = _trimmer()


def give_back() -> None:
    """Returns freed pages to the kernel: glibc keeps them, for a process that may never need so much again. Blocks."""
    if _trim is not None:
        _trim(0)
