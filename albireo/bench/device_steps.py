"""The same steps on the device, by the node's own timeline.

Where a step is late at a client, this says whether it was late there already, or on its way from
there; and whether the device had to wait for it, which is the host's or the node's doing, not the
device's.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from albireo.ipc.stages import Stage
from albireo.trace.rows import NodeTimelines


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
                records = source.newest()
                forward = records[records["stage"] == Stage.FORWARD]
                sample = records[records["stage"] == Stage.SAMPLE]
                sample = sample[sample["end_ns"] <= end * 1e9][-count - 1 :]
                # The oldest may have lost its first record; the newest ones may have no second yet.
                _, ours, its = np.intersect1d(
                    forward["step"], sample["step"], assume_unique=True, return_indices=True
                )
                begins = forward["start_ns"][ours].astype(np.int64)
                ends = sample["end_ns"][its].astype(np.int64)
                steps, idle = np.diff(ends) / 1e9, (begins[1:] - ends[:-1]) / 1e9
                return DeviceTimes(steps.tolist(), idle.tolist())
        return DeviceTimes([], [])
