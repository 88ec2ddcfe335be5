"""How many cores this process may use: its affinity's, or fewer where a cgroup has a quota."""

from __future__ import annotations

import math
import os
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_OWN = Path("/proc/self/cgroup")


def usable_cores(cgroups: Path = _CGROUPS, own: Path = _OWN) -> int:
    """At least 1.  A quota of a part of a core counts as a core (cgroup v2, cpu.max)."""
    cores = len(os.sched_getaffinity(0))
    return min([cores, *(math.ceil(quota) for quota in _quotas(cgroups, own))])


def _quotas(cgroups: Path, own: Path) -> list[float]:
    """Cores, of this process's group and of all that it is part of."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return []
    # The line of cgroup v2 begins with 0::; a machine with v1 alone has none.
    path = next((line.removeprefix("0::/") for line in lines if line.startswith("0::/")), None)
    if path is None:
        return []
    found = []
    for group in (cgroups / path, *(cgroups / path).parents):
        try:
            quota, period = (group / "cpu.max").read_text().split()
            if quota != "max":
                found.append(int(quota) / int(period))
        except (OSError, ValueError):
            pass  # The root has no such file.
        if group == cgroups:
            break
    return found
