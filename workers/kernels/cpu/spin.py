"""Waiting awake for a counter, without the interpreter's lock.

A thread that spins in Python gives the lock up and takes it again every microsecond.  Whoever
else wants it sleeps until it is free, and finds it taken again when it is awake.
"""

from __future__ import annotations

import time

from ...machine_code import native
from .atomics import atomic_load, relax

_ROUNDS = 40_000
"""1 to 2 ms: so often the time is looked at.  That takes the lock, and who has it meanwhile, or
wants it, is held up: every 0.1 ms that was the thread that hands out results, in most steps."""


def spin_until(address: int, target: int, end_s: float) -> None:
    """Returns once the 64-bit counter at `address` has reached `target`, or soon after end_s, by
    time.monotonic()."""
    while not _spin(address, target, _ROUNDS) and time.monotonic() < end_s:
        pass


@native("boolean(int64, int64, int64)")
def _spin(address: int, target: int, rounds: int) -> bool:
    for _ in range(rounds):
        if atomic_load(address) >= target:
            return True
        relax()
    return False
