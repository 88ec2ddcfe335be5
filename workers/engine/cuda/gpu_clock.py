"""The GPU's part of the timeline: when each step really ran, on the CPU's clock.

Events of one stream tell how far they are apart, to half a microsecond, and
nothing else.  So the steps are strung together, each at its distance behind the
one before: gaps between steps are the GPU's own measure.  The string is tied to
the CPU's clock at its first step, which was launched onto an idle GPU.  From
then on two facts hold it: no step begins before it was launched, and none ends
after the CPU saw its end.  The least time that the CPU needs to see an end, over
some dozens of steps, stays what it was at the beginning: where it grows or
shrinks the clocks have drifted apart, and the string is moved after it, by less
than a ten-thousandth.

A distance is a float32 in milliseconds, good for short ones only: after a long
pause a new string begins.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

from ....ipc.stages import Stage
from ....ipc.timeline import DEVICE, RESULTS, Recorder

if TYPE_CHECKING:
    from .event_waiter import EventTimes
    from .flights import Flight

_LONG_PAUSE_MS = 100.0
_WINDOW = 32
_MAX_DRIFT = 1e-4


class GpuTimes(NamedTuple):
    """CLOCK_MONOTONIC, ns."""

    begun_ns: int
    forwarded_ns: int
    done_ns: int


class GpuClock:
    """Places one step after the other."""

    def __init__(self) -> None:
        self._done_ns: float | None = None
        self._begin_string()

    def _begin_string(self) -> None:
        self._steps = 0
        self._least_ns = math.inf
        self._usual_ns: float | None = None
        self._drift_ns = self._nudge_ns = 0.0  # of a step: as found so far, and to be made up for

    def place(
        self,
        launched_ns: int,
        seen_ns: int,
        gap_ms: float | None,
        forward_ms: float,
        sample_ms: float,
    ) -> GpuTimes:
        """When a step ran that was launched and seen ended at these times.

        gap_ms: since the end of the step before, None where there was none.
        """
        before = self._done_ns
        begun = float(launched_ns)
        if before is not None and gap_ms is not None and gap_ms < _LONG_PAUSE_MS:
            took_ns = (gap_ms + forward_ms + sample_ms) * 1e6
            nudge = min(max(self._nudge_ns, -_MAX_DRIFT * took_ns), _MAX_DRIFT * took_ns)
            begun = max(begun, before + gap_ms * 1e6 + nudge)
        else:
            self._begin_string()
        done = begun + (forward_ms + sample_ms) * 1e6
        self._look_at_drift(seen_ns - done)
        if done > seen_ns:
            begun, done = begun - (done - seen_ns), float(seen_ns)
        self._done_ns = done
        return GpuTimes(round(begun), round(begun + forward_ms * 1e6), round(done))

    def _look_at_drift(self, noticed_ns: float) -> None:
        """noticed_ns: from a step's end, as placed, to when the CPU saw it."""
        self._least_ns = min(self._least_ns, noticed_ns)
        self._steps += 1
        if self._steps % _WINDOW:
            return
        if self._usual_ns is None:
            self._usual_ns = max(0.0, self._least_ns)
        error_ns = (self._least_ns - self._usual_ns) / _WINDOW
        self._drift_ns += error_ns / 16
        self._nudge_ns = self._drift_ns + error_ns / 4
        self._least_ns = math.inf


class FlightRecorder:
    """Used by the thread that waits for the flights, in their order."""

    def __init__(self, fds: Mapping[str, int]) -> None:
        self._device = Recorder.of(fds, DEVICE)
        self._results = Recorder.of(fds, RESULTS)
        self._clock = GpuClock()

    def landed(self, flight: Flight, times: EventTimes, seen_ns: int) -> None:
        """The step was seen to have ended at seen_ns, and its result is delivered by now."""
        delivered_ns = time.monotonic_ns()
        step, rows = flight.step, flight.count
        self._results.record(Stage.DELIVER, step, seen_ns, delivered_ns, rows)
        placed = self._clock.place(
            flight.launched_ns, seen_ns, times.gap_ms, times.forward_ms, times.sample_ms
        )
        self._device.record(Stage.FORWARD, step, placed.begun_ns, placed.forwarded_ns, rows)
        self._device.record(Stage.SAMPLE, step, placed.forwarded_ns, placed.done_ns, rows)
