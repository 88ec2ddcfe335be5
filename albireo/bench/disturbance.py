"""Moments in which the machine itself is slow, whoever works on it.

A host can lower its processors' clock for some ten milliseconds, to a twelfth on machines where
it was looked into (docs/late-steps.md): all processes are as much slower, with nothing to see in
their own times or in /proc/stat.  So a process beside the measured ones counts to the same number
every millisecond, and takes the CPU time of it.  Waiting for a core is no part of that, and
counting uses no memory for which another process might compete: it is several times slower when
the core is, and then what was measured says nothing of the node.
"""

from __future__ import annotations

import os
import select
import statistics
import subprocess
import sys
import time
from array import array
from types import TracebackType
from typing import NamedTuple, Self

_EVERY_S = 0.001
_SLOW = 3.0
"""Times the usual.  A core whose other hyperthread is busy is up to twice as slow."""
_COUNT, _PIECES = range(500), 3
"""Three times some 7 us at full clock.  The least of them is taken: single ones are longer now and
then on a machine that is as fast as ever."""


class Moment(NamedTuple):
    """From when to when, in seconds of time.perf_counter(), and how many times the usual counting
    took at most."""

    begin: float
    end: float
    slowdown: float


class Watcher:
    """Watches the machine from `with` on, until slow_moments() is asked for."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes]

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert self._process.stdout is not None
        self._process.stdout.read(1)  # it watches
        return self

    def slow_moments(self) -> list[Moment]:
        """Ends the watch."""
        said, _ = self._process.communicate()
        times = array("q", said)
        return slow_moments(list(zip(times[0::2], times[1::2], strict=True)))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._process.poll() is None:
            self._process.communicate()


def slow_moments(samples: list[tuple[int, int]]) -> list[Moment]:
    """samples: (when, CPU time) of counting to the same number each time, in ns.

    A moment is from the sample before slow ones to the one behind them.  A clock that has fallen
    climbs back in steps; what is less than three times slower then is no part of it: tokens that
    were late already come at shorter distances there.
    """
    if not samples:
        return []
    usual = statistics.median(took for _, took in samples)
    found: list[Moment] = []
    for place, (at, took) in enumerate(samples):
        if took <= _SLOW * usual:
            continue
        begin = samples[max(place - 1, 0)][0] * 1e-9
        end = max(at + took, samples[min(place + 1, len(samples) - 1)][0]) * 1e-9
        slowdown = took / usual
        if found and begin <= found[-1].end:
            before = found.pop()
            begin, slowdown = before.begin, max(slowdown, before.slowdown)
        found.append(Moment(begin, end, slowdown))
    return found


def _count_ns(numbers: range) -> int:
    """CPU time of counting, the least of some times."""
    least = sys.maxsize
    for _ in range(_PIECES):
        began = time.thread_time_ns()
        for _ in numbers:
            pass
        least = min(least, time.thread_time_ns() - began)
    return least


def _watch() -> None:
    """Until standard input is closed: (perf_counter_ns, CPU time in ns) of each counting."""
    times = array("q")
    os.write(1, b"!")
    while not select.select([0], [], [], _EVERY_S)[0]:
        times.append(time.perf_counter_ns())
        times.append(_count_ns(_COUNT))
    sys.stdout.buffer.write(times.tobytes())


if __name__ == "__main__":
    _watch()
