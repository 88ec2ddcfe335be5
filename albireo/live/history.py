"""Samples of a node, the newest last, and what changed between two of them.

Counters belong to processes that can be started again: a new router begins a
new history, and a counter of a group that has become smaller counts from 0.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import msgspec

from .machine import GpuReading

KEPT_S = 30.0
"""Percentiles are of so long."""
RATE_S = 3.0
"""Rates are of so long: groups report their counters once a second."""


class Sample(msgspec.Struct, frozen=True):
    """at_s: monotonic clock.  tree: the router's status tree.  cpu_s: by the actors' names.

    gpus: by UUID.
    """

    at_s: float
    tree: dict[str, Any]
    cpu_s: dict[str, float]
    gpus: dict[str, GpuReading]


class History:
    """Samples of KEPT_S."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque()

    def __len__(self) -> int:
        return len(self._samples)

    @property
    def newest(self) -> Sample:
        return self._samples[-1]

    def add(self, sample: Sample) -> None:
        """Keeps it.  Samples come in the order of their times."""
        samples = self._samples
        if samples and not _same_router(samples[-1].tree, sample.tree):
            samples.clear()
        samples.append(sample)
        # One may be older: it is where the half minute begins.
        while len(samples) > 2 and samples[1].at_s <= sample.at_s - KEPT_S:
            samples.popleft()

    def clear(self) -> None:
        self._samples.clear()

    def before(self, span_s: float) -> Sample | None:
        """The newest sample that is `span_s` older than the newest, else the oldest; None = no
        other."""
        if len(self._samples) < 2:
            return None
        until = self.newest.at_s - span_s
        for sample in reversed(self._samples):
            if sample.at_s <= until:
                return sample
        return self._samples[0]


def _same_router(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    if old["node"] != new["node"] or new["uptime_s"] < old["uptime_s"]:
        return False
    pids = [
        next((each["pid"] for each in tree["actors"] if each["name"] == "router"), None)
        for tree in (old, new)
    ]
    return None in pids or pids[0] == pids[1]


def grown(new: float, old: float) -> float:
    """What a counter has grown by; one that has become smaller has begun anew."""
    return new - old if new >= old else new
