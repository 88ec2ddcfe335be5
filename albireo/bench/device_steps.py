"""The same steps on the device, by the node's own timeline.

Where a step is late at a client, this says whether it was late on the device, or on its way from
there.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from albireo.ipc.stages import Stage
from albireo.trace.rows import NodeTimelines


class DeviceSteps:
    """Of rank 0 of the first group of the node with that runtime directory."""

    def __init__(self, runtime_dir: Path) -> None:
        self._timelines = NodeTimelines(runtime_dir)

    def between(self, begin: float, end: float) -> list[float]:
        """Milliseconds from the end of a step to that of the next, of all that ended meanwhile.

        begin, end: seconds of time.perf_counter().  Of the newest steps that the timeline still
        has, which are some thousands.
        """
        for source in self._timelines.group(0):
            if source.device and source.rank == 0:
                records = source.newest()
                ends = records["end_ns"][records["stage"] == Stage.SAMPLE]
                within = ends[(ends >= begin * 1e9) & (ends <= end * 1e9)]
                gaps: list[float] = (np.diff(within.astype(np.int64)) / 1e6).tolist()
                return gaps
        return []
