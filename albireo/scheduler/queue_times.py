"""How long requests wait until a step is planned for them: from their arrival at the router.

A request counts when it gets its first slot; one that was preempted, or comes
with tokens of an earlier attempt, does not count again.
"""

from __future__ import annotations

from albireo.ipc.histogram import WHOLE_REQUEST_S, Histogram
from albireo.ipc.messages import Submit
from albireo.ipc.plan import TAKE_REQUEST, Int32Array


class QueueTimes:
    """Of one group."""

    def __init__(self) -> None:
        self.histogram = Histogram(WHOLE_REQUEST_S)
        self._arrived: dict[int, float] = {}

    def submitted(self, submit: Submit) -> None:
        if submit.arrived_s and not submit.resumed:
            self._arrived[submit.request] = submit.arrived_s

    def gone(self, request: int) -> None:
        """It has ended, however it did."""
        self._arrived.pop(request, None)

    def clear(self) -> None:
        self._arrived.clear()

    def planned(self, take: Int32Array, now: float) -> None:
        """The plan's slots that were given away at `now`, of the monotonic clock in seconds."""
        for request in take[:, TAKE_REQUEST].tolist():
            arrived = self._arrived.pop(request, None)
            if arrived is not None:
                self.histogram.record(max(0.0, now - arrived))
