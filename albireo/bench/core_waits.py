"""How long threads were ready to run and had no core, by the kernel's own count.

A late step of a node whose threads have waited is this machine's scheduler's doing; where they
have not, it is the node's own, or a host's that has lent the cores to others.  Hosts may say how
long they did ("steal" in proc(5)).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path

Waits = dict[str, float]
"""Milliseconds by process, all threads together."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_STEAL = 8
"""Place of the field in the first line of /proc/stat, behind the name "cpu"."""


class CoreWaits:
    """Of some processes, from here on.  pids: by their names; one that ends counts no more.

    stat: where the kernel tells the times of all cores.
    """

    def __init__(self, pids: Mapping[str, int], stat: Path = Path("/proc/stat")) -> None:
        self._pids = dict(pids)
        self._stat = stat
        self._stolen_before = _stolen_ms(stat)
        self._before = {name: _waited_ns(pid) for name, pid in self._pids.items()}

    def waited(self) -> Waits:
        """Since this was made; of those that have waited at all."""
        found: Waits = {}
        for name, pid in self._pids.items():
            before = self._before[name]
            waited = sum(ns - before.get(task, 0) for task, ns in _waited_ns(pid).items()) / 1e6
            if waited >= 0.01:
                found[name] = round(waited, 2)
        return found

    def stolen_ms(self) -> float:
        """What the host has lent of all cores of this machine since then, as far as it says so.

        In clock ticks, of 10 ms mostly.
        """
        return round(_stolen_ms(self._stat) - self._stolen_before, 1)


def _stolen_ms(stat: Path) -> float:
    with contextlib.suppress(OSError, ValueError, IndexError):
        of_all_cores = stat.read_text().splitlines()[0]
        return int(of_all_cores.split()[_STEAL]) / _TICKS_PER_S * 1e3
    return 0.0


def _waited_ns(pid: int) -> dict[str, int]:
    """By thread; nothing where the kernel does not count, or the process is not there."""
    found: dict[str, int] = {}
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # a thread may end meanwhile
            _ran, waited, _turns = task.read_text().split()
            found[task.parent.name] = int(waited)
    return found
