"""What a process that reads foreign files may use, and how it gives up the rest.

Needs the standard library alone: a process can leave the network only before a library has started a thread.
"""

import ctypes
import math
import os
import re
import resource
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# How libraries say that there is no memory, in their errors or as they end the process.
OUT_OF_MEMORY = re.compile(
    rb"bad_alloc|bad allocation|MemoryError|OOM when allocating|[Ff]ailed to allocate memory|[Cc]annot allocate memory"
    rb"|[Mm]emory allocation|failed to map segment|pthread_create|out of memory|Out of memory"
)

_LEAST_MEMORY_BYTES = 2 * 2**30
_OPEN_FILES = 256
_NEW_NETWORK = 0x40000000
_NEW_USER = 0x10000000


def _half_of_memory() -> int:
    """Half, because ONNX Runtime has a process of its own beside that of the model, each with this limit."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # no Linux, no container, or no limit: `max`
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text("ascii")))
    return max(total // 2, _LEAST_MEMORY_BYTES)


@dataclass(frozen=True)
class Limits:
    """What the conversion of a file may use; what it exceeds is the `rule` of the `UnsafeFileError`.

    `memory_bytes` (rule `memory`, on Linux only) and `cpu_seconds` (`cpu-time`, of all threads together) hold for each
    of the two processes, the model's and ONNX Runtime's; by default the first is half of the machine's or container's
    memory. `file_bytes` (`file-size`) holds for each file written, and `wall_seconds` (`wall-clock`) for everything.
    """

    memory_bytes: int = field(default_factory=_half_of_memory)
    cpu_seconds: int = 3600
    wall_seconds: float = 1800.0
    file_bytes: int = 16 * 2**30

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < math.inf:
                raise ValueError(f"The limit {name} is a number above 0; it is {value}.")


def confine(limits: Limits) -> None:
    """Holds for this process and for all that it starts, and cannot be taken back."""
    _leave_network()
    # What is mapped but never written to, as libraries are, is no danger: RLIMIT_AS would count it.
    _limit(resource.RLIMIT_DATA, limits.memory_bytes)
    # At the soft limit comes SIGXCPU, at the hard one SIGKILL, which does not say why.
    _limit(resource.RLIMIT_CPU, limits.cpu_seconds, limits.cpu_seconds + 1)
    _limit(resource.RLIMIT_FSIZE, limits.file_bytes)
    _limit(resource.RLIMIT_NOFILE, _OPEN_FILES)
    _limit(resource.RLIMIT_CORE, 0)


def _limit(kind: int, soft: int, hard: int | None = None) -> None:
    _, most = resource.getrlimit(kind)
    wanted = (soft, soft if hard is None else hard)
    resource.setrlimit(kind, wanted if most == resource.RLIM_INFINITY else (min(soft, most), min(wanted[1], most)))


def _leave_network() -> None:
    """Into a network of its own, without anybody in it, where the kernel allows it."""
    if sys.platform != "linux":
        return
    user, group = os.getuid(), os.getgid()
    unshare = ctypes.CDLL(None).unshare
    # Root in a user namespace could not read others' files any more, and may mostly do without one.
    if unshare(_NEW_NETWORK) != 0 and user != 0 and unshare(_NEW_USER | _NEW_NETWORK) == 0:
        with suppress(OSError):  # the names of user and group alone depend on it
            Path("/proc/self/uid_map").write_text(f"{user} {user} 1", "ascii")
            Path("/proc/self/setgroups").write_text("deny", "ascii")
            Path("/proc/self/gid_map").write_text(f"{group} {group} 1", "ascii")
