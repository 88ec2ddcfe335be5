"""What kernels in a CUDA graph cost, replayed for a moment or at the GPU's power limit.

For gpu_layers.py and gpu_tunings.py.  A moment, the median of some rounds of 4 ms, is what a
kernel takes at the GPU's full clock.  A GPU that computes for longer may run out of power: what
counts then is energy, and another kernel may be the best.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

_ROUNDS, _ROUND_MS = 5, 4.0
_sustained_s = 0.0


@dataclass(frozen=True)
class Cost:
    """Microseconds, and millijoules of the whole GPU, 0 where they are not measured."""

    us: float
    mj: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.us + other.us, self.mj + other.mj)

    def __mul__(self, times: float) -> Cost:
        return Cost(self.us * times, self.mj * times)


def sustain(seconds: float) -> None:
    """From now on graphs are replayed for so long before they are measured for as long; 0: not."""
    global _sustained_s
    _sustained_s = seconds


def replay(run: Callable[[], object]) -> Cost:
    """Of all that `run` launches, captured in one graph."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def once_us(replays: int) -> float:
        start.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / replays * 1e3

    once = once_us(1)
    if not _sustained_s:
        replays = max(1, int(_ROUND_MS * 1e3 / once))
        return Cost(statistics.median(once_us(replays) for _ in range(_ROUNDS)))
    replays = max(1, int(_sustained_s * 1e6 / once))
    once_us(replays)
    before = _millijoules()
    us = once_us(replays)
    return Cost(us, (_millijoules() - before) / replays)


def _millijoules() -> int:
    """Of the current GPU since its driver was loaded, at a moment when the counter has moved."""
    import pynvml

    first = pynvml.nvmlDeviceGetTotalEnergyConsumption(_handle())
    while (now := pynvml.nvmlDeviceGetTotalEnergyConsumption(_handle())) == first:
        time.sleep(0.0002)
    return int(now)


@functools.cache
def _handle() -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(
        f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    )
