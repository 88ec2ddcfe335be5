"""A worker's part of the timeline: waiting, input, the device's work, the way out."""

from __future__ import annotations

import time
from collections.abc import Mapping

from ...ipc.stages import Stage
from ...ipc.timeline import DEVICE, NO_STEP, Recorder
from .step import StepResult


class StepRecorder:
    """Used by the worker's loop.  An engine that only launches records its device itself."""

    def __init__(self, fds: Mapping[str, int]) -> None:
        self._loop = Recorder.of(fds)
        self._device = Recorder.of(fds, DEVICE)

    def waited(self, start_ns: int, end_ns: int) -> None:
        """There was no plan in between."""
        self._loop.record(Stage.WAIT, NO_STEP, start_ns, end_ns)

    def launched(self, step: int, start_ns: int, end_ns: int, words: int) -> None:
        """A plan of so many words is under way on the device."""
        self._loop.record(Stage.INPUT, step, start_ns, end_ns, words)

    def computed(
        self, step: int, start_ns: int, end_ns: int, result: StepResult, words: int
    ) -> None:
        """A plan taken at start_ns was carried out by end_ns, and its result delivered by now."""
        delivered_ns = time.monotonic_ns()
        times = result.times
        if times is None:
            return
        rows = len(result.rows)
        self._loop.record(Stage.INPUT, step, start_ns, times.ready_ns, words)
        self._device.record(Stage.FORWARD, step, times.begun_ns, times.forwarded_ns, rows)
        self._device.record(Stage.SAMPLE, step, times.forwarded_ns, times.done_ns, rows)
        self._loop.record(Stage.DELIVER, step, end_ns, delivered_ns, rows)
