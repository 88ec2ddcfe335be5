"""What kernels in a CUDA graph cost, replayed for a moment or at the GPU's power limit.

For gpu_layers.py and gpu_tunings.py.  A moment, the median of some rounds of 4 ms, is what a
kernel takes at the GPU's full clock.  A GPU that computes for longer may run out of power: what
counts then is energy, and another kernel may be the best.
"""

from __future__ import annotations

import contextlib
import functools
import statistics
import threading
import time
from collections.abc import Callable, Iterator
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
    with _watched() as ticks:
        us = once_us(replays)
    if len(ticks) < 2:
        raise RuntimeError(f"{_sustained_s:g} s: the counter of energy has not moved twice in them")
    (first_s, first_mj), (last_s, last_mj) = ticks[0], ticks[-1]
    return Cost(us, (last_mj - first_mj) / (last_s - first_s) * us * 1e-6)


@contextlib.contextmanager
def _watched() -> Iterator[list[tuple[float, int]]]:
    """(seconds, millijoules of the current GPU) at each moment in the block at which the driver's
    counter, which stands still for some 50 ms at a time, has moved."""
    ticks: list[tuple[float, int]] = []
    handle, done = _handle(), threading.Event()

    def watch() -> None:
        import pynvml

        before = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        while not done.wait(0.0005):
            now = pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
            if now != before:
                ticks.append((time.perf_counter(), now))
                before = now

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield ticks
    finally:
        done.set()
        watcher.join()


@functools.cache
def _handle() -> Any:
    import pynvml

    pynvml.nvmlInit()
    return pynvml.nvmlDeviceGetHandleByUUID(
        f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    )
