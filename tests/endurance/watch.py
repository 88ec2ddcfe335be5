"""Memory and open files of a node's processes over time, and whether they grow.

Memory is what a process would free by ending (USS).  Its slope is Theil's and
Sen's, the median of the slopes of all pairs of samples, which single steps of an
allocator do not move.
"""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass, field

import psutil


@dataclass
class Series:
    """Of one process.  uss: bytes."""

    pid: int
    times: list[float] = field(default_factory=list)
    uss: list[int] = field(default_factory=list)
    fds: list[int] = field(default_factory=list)

    @property
    def growth_bytes(self) -> float:
        """Over the whole time, along the slope."""
        return slope(self.times, self.uss) * (self.times[-1] - self.times[0])


class Watch:
    """pids: by the process's name."""

    def __init__(self, pids: dict[str, int]) -> None:
        self.series = {name: Series(pid) for name, pid in pids.items()}

    def sample(self, settle_s: float = 0.0) -> None:
        """Raises psutil.NoSuchProcess for one that has ended.

        settle_s: how long a process may take to close what was open before, as the connection of
        who asked last.
        """
        deadline = time.monotonic() + settle_s
        for each in self.series.values():
            process = psutil.Process(each.pid)
            each.times.append(time.monotonic())
            each.uss.append(process.memory_full_info().uss)
            while (fds := process.num_fds()) > min(each.fds, default=fds):
                if time.monotonic() > deadline:
                    break
                time.sleep(0.02)
            each.fds.append(fds)

    def faults(self, most_bytes: float, most_fds: int) -> list[str]:
        """Who has grown by more."""
        found = []
        for name, each in self.series.items():
            if each.growth_bytes > most_bytes:
                found.append(f"{name} has grown by {each.growth_bytes / 2**20:.2f} MiB")
            if max(each.fds[-3:]) - each.fds[0] > most_fds:
                found.append(f"{name} had {each.fds[0]} open files, and has {each.fds[-1]}")
        return found

    def table(self, requests: int) -> str:
        """A line for each process; requests: that were served meanwhile."""
        lines = [
            f"{'process':16} {'USS MiB':>8} {'growth MiB':>11} {'bytes/request':>14} "
            f"{'open files':>12}"
        ]
        for name, each in sorted(self.series.items()):
            grown = each.growth_bytes
            lines.append(
                f"{name:16} {each.uss[-1] / 2**20:8.1f} {grown / 2**20:11.3f} "
                f"{grown / max(1, requests):14.1f} {each.fds[0]:5d} ->{each.fds[-1]:5d}"
            )
        return "\n".join(lines)


def slope(times: list[float], values: list[int]) -> float:
    """Theil-Sen, per second."""
    pairs = itertools.combinations(zip(times, values, strict=True), 2)
    return statistics.median((b[1] - a[1]) / (b[0] - a[0]) for a, b in pairs if b[0] > a[0])
