"""The same steps on the device, by the node's own timeline.

Where a step is late at a client, this says whether it was late there already, or on its way from
there; and whether the device had to wait for it, which is the host's or the node's doing, not the
device's.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from albireo.trace.rows import NodeTimelines
from albireo.trace.stages import Steps


class DeviceTimes(NamedTuple):
    """Seconds, by step: from the end of the one before to its own, and what the device did nothing
    of that."""

    steps: list[float]
    idle: list[float]


class DeviceSteps:
    """Of rank 0 of the first group of the node with that runtime directory."""

    def __init__(self, runtime_dir: Path) -> None:
        self._timelines = NodeTimelines(runtime_dir)

    def before(self, end: float, count: int) -> DeviceTimes:
        """The last `count` steps that ended before `end`, in seconds of time.perf_counter().

        Fewer where the timeline has lost them: it keeps 16,384.
        """
        for source in self._timelines.group(0):
            if source.device and source.rank == 0:
                steps = Steps(source.newest(), count, 0, round(end * 1e9))
                took, idle = steps.done - steps.before, steps.begin - steps.before
                return DeviceTimes((took / 1e9).tolist(), (idle / 1e9).tolist())
        return DeviceTimes([], [])
