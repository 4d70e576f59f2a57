"""How many threads this process may keep running, and how they are shared out."""

import math
import os
from pathlib import Path

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def available_cores() -> int:
    """The CPUs that this process may run on, or fewer where its cgroup (v2) has a quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = _CGROUP_QUOTA.read_text(encoding="ascii").split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, math.ceil(int(quota) / int(period))))


def threads_per_instance(configured: int, instances: int) -> int:
    """Threads of one run: as configured, or the cores shared out, so that no more threads run than there are cores."""
    return configured or max(1, available_cores() // instances)
