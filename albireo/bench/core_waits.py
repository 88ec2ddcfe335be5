"""How long threads were ready to run and had no core, by the kernel's own count.

A late step of a node whose threads have waited is this machine's scheduler's doing; where they
have not, it is the node's own, or a host's that has lent the cores to others.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path

Waits = dict[str, float]
"""Milliseconds by process, all threads together."""


class CoreWaits:
    """Of some processes, from here on.  pids: by their names; one that ends counts no more."""

    def __init__(self, pids: Mapping[str, int]) -> None:
        self._pids = dict(pids)
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


def _waited_ns(pid: int) -> dict[str, int]:
    """By thread; nothing where the kernel does not count, or the process is not there."""
    found: dict[str, int] = {}
    for task in Path(f"/proc/{pid}/task").glob("*/schedstat"):
        with contextlib.suppress(OSError, ValueError):  # a thread may end meanwhile
            _ran, waited, _turns = task.read_text().split()
            found[task.parent.name] = int(waited)
    return found
