"""Waits for a step's events, and says how far they are apart, by the driver's own calls."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from ...kernels.cpu.step_end import EventCalls, wait_for_step
from ...kernels.cuda.libcuda import libcuda


class EventTimes(NamedTuple):
    """Of a step.  gap_ms: behind the end of the one before; None where there was none."""

    gap_ms: float | None
    forward_ms: float
    sample_ms: float

    @property
    def forward_us(self) -> int:
        return round(self.forward_ms * 1e3)

    @property
    def step_us(self) -> int:
        return round((self.forward_ms + self.sample_ms) * 1e3)


class EventWaiter:
    """Used by one thread.  calls: CUDA's functions; None = the driver's."""

    def __init__(self, calls: EventCalls | None = None) -> None:
        self._calls = calls or EventCalls(
            libcuda().cuEventSynchronize, libcuda().cuEventElapsedTime
        )
        self._times = np.zeros(3, np.float32)

    def wait(
        self,
        before: torch.cuda.Event | None,
        begun: torch.cuda.Event,
        forwarded: torch.cuda.Event,
        sampled: torch.cuda.Event,
        done: torch.cuda.Event,
    ) -> EventTimes:
        """Returns once `done` has happened.  All events are recorded, the others with timing.

        before: `sampled` of the step before, which nobody has recorded again.
        Raises RuntimeError with CUDA's words when the GPU has failed.
        """
        status = wait_for_step(
            self._calls.synchronize,
            self._calls.elapsed,
            before.cuda_event if before is not None else 0,
            begun.cuda_event,
            forwarded.cuda_event,
            sampled.cuda_event,
            done.cuda_event,
            self._times,
        )
        if status:
            done.synchronize()  # raises what PyTorch has to say to it
            raise RuntimeError(f"CUDA error {status} at the events of a step")
        gap_ms, forward_ms, sample_ms = self._times.tolist()
        return EventTimes(gap_ms if before is not None else None, forward_ms, sample_ms)
