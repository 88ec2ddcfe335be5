"""A team of threads that shares the items of a launch, outside the interpreter.

A launch is: one item function, its parameters, a number of items.  The thread
that launches works too; helpers are Python threads that live in one numba
function without the GIL, spin a little when there is nothing to do and then
sleep on a futex.  Which thread takes which item never changes a result: items
write disjoint memory.

    control words, one cache line each
      0 sequence    counts launches; helpers sleep on it
      1 sleepers    helpers that sleep or are about to
      2 remaining   items not taken yet; zero or less: nothing to take
      3 completed   items done of the current launch
      4 function, items, helpers, spin
      6.. params    int64 words: addresses, sizes, floats as their bits

An item is taken by counting `remaining` down.  Whoever got a positive number
holds up the launch until it adds to `completed`, so function and params are
stable while they are read; a helper that wakes late gets zero or less and
goes back to sleep.
"""

from __future__ import annotations

import signal
import struct
import threading

import numpy as np
from numba import njit

from ....ipc.cpu_quota import usable_cores
from ...machine_code import ItemFunction, native
from .atomics import (
    atomic_add,
    atomic_load,
    atomic_store,
    call_item,
    futex_wait,
    futex_wake,
    relax,
    yield_core,
)
from .simd import load_i64, store_i64

_LINE = 64
_SEQUENCE, _SLEEPERS, _REMAINING, _COMPLETED = 0, _LINE, 2 * _LINE, 3 * _LINE
_FUNCTION, _ITEMS, _HELPERS, _SPIN = (4 * _LINE + 8 * i for i in range(4))
_PARAMS = 6 * _LINE
_CONTROL_BYTES = 10 * _LINE
_SCRATCH_BYTES = 1 << 22
"""Each thread's own memory for one item; pages that are never used cost nothing."""
_SPIN_ROUNDS = 2000
"""Rounds of about 25 ns a helper looks for work before it sleeps: the gaps between kernels of one
step are shorter, the gap between two steps is longer."""

_ITEM_WORK = 1 << 15


def item_rows(rows: int, elements: int, threads: int) -> tuple[int, int]:
    """How row-wise kernels cut `rows` rows of `elements` each: (rows an item, items).

    One item where there is only one thread or too little work to share.  A
    row's items may use 12 bytes of scratch for each element; raises ValueError
    for rows so long that they do not fit.
    """
    if elements * 12 > _SCRATCH_BYTES:
        raise ValueError(f"rows of {elements} elements: the limit is {_SCRATCH_BYTES // 12}")
    if threads == 1 or rows * elements < 2 * _ITEM_WORK:
        return rows, 1
    per_item = max(1, -(-rows // max(4 * threads, 1)))
    return per_item, -(-rows // per_item)


@njit(nogil=True)
def _take_items(team: int, scratch: int) -> None:
    """Takes items until none is left."""
    while True:
        left = atomic_add(team + _REMAINING, -1)
        if left <= 0:
            return
        item = load_i64(team + _ITEMS) - left
        call_item(load_i64(team + _FUNCTION), team + _PARAMS, item, scratch)
        atomic_add(team + _COMPLETED, 1)


@native("void(int64, int64)")
def _serve(team: int, scratch: int) -> None:
    """A helper's life; ends when the sequence becomes negative."""
    seen = 0
    while True:
        now = atomic_load(team + _SEQUENCE)
        rounds = load_i64(team + _SPIN)
        while now == seen and rounds > 0:
            relax()
            rounds -= 1
            now = atomic_load(team + _SEQUENCE)
        if now == seen:
            atomic_add(team + _SLEEPERS, 1)
            while now == seen:
                futex_wait(team + _SEQUENCE, seen)
                now = atomic_load(team + _SEQUENCE)
            atomic_add(team + _SLEEPERS, -1)
        if now < 0:
            return
        seen = now
        _take_items(team, scratch)


@native("void(int64, int64, int64, int64, boolean)")
def _launch(team: int, scratch: int, function: int, items: int, shared: bool) -> None:
    """Runs all items of a function whose parameters are in place; alone unless `shared`."""
    if not shared:
        for item in range(items):
            call_item(function, team + _PARAMS, item, scratch)
        return
    store_i64(team + _FUNCTION, function)
    store_i64(team + _ITEMS, items)
    atomic_store(team + _COMPLETED, 0)
    atomic_store(team + _REMAINING, items)
    atomic_add(team + _SEQUENCE, 1)
    if atomic_load(team + _SLEEPERS) > 0:
        futex_wake(team + _SEQUENCE, load_i64(team + _HELPERS))
    _take_items(team, scratch)
    rounds = load_i64(team + _SPIN)
    while atomic_load(team + _COMPLETED) < items:
        if rounds > 0:
            rounds -= 1
            relax()
        else:
            yield_core()


class Parameters(struct.Struct):
    """How the parameters of an item function are packed: "q" an int64, "d" a float64."""


def _help(team: int, scratch: int) -> None:
    """A helper thread; signals are for the main thread."""
    signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    _serve(team, scratch)


class Team:
    """This process's threads with their scratch memory; `threads - 1` of them are helpers.

    Helpers start at the first shared launch, are daemons, and end with close().
    Not to be used by two threads at a time, nor in a forked child (make a new one).
    """

    def __init__(self, threads: int) -> None:
        if threads < 1:
            raise ValueError(f"a team needs at least one thread, not {threads}")
        self.threads = threads
        self._memory = np.zeros(_CONTROL_BYTES + threads * _SCRATCH_BYTES + _LINE, np.uint8)
        start = -self._memory.ctypes.data % _LINE
        self._team = self._memory.ctypes.data + start
        self._scratch = self._team + _CONTROL_BYTES
        self._params = memoryview(self._memory.data)[start + _PARAMS : start + _CONTROL_BYTES]
        words = self._memory[start : start + _CONTROL_BYTES].view(np.int64)
        words[_HELPERS // 8] = threads - 1
        words[_SPIN // 8] = _SPIN_ROUNDS if usable_cores() >= threads else 0
        self._started = False

    def launch(
        self, function: ItemFunction, items: int, shared: bool, layout: Parameters, *values: float
    ) -> None:
        """Runs items 0 .. items-1; returns when all are done.

        shared: the work is worth waking the helpers for.
        """
        layout.pack_into(self._params, 0, *values)
        shared = shared and items > 1 and self.threads > 1
        if shared and not self._started:
            self._start()
        _launch(self._team, self._scratch, function.address, items, shared)

    def close(self) -> None:
        """Ends the helpers; the team then works alone."""
        if self._started:
            _stop(self._team, self.threads)
            for helper in self._helpers:
                helper.join()
        self.threads = 1
        self._started = False

    def _start(self) -> None:
        self._started = True
        self._helpers = [
            threading.Thread(
                target=_help,
                args=(self._team, self._scratch + rank * _SCRATCH_BYTES),
                name=f"kernels-{rank}",
                daemon=True,
            )
            for rank in range(1, self.threads)
        ]
        for helper in self._helpers:
            helper.start()


@native("void(int64, int64)")
def _stop(team: int, helpers: int) -> None:
    """Tells the helpers to return."""
    atomic_store(team + _SEQUENCE, -1)
    futex_wake(team + _SEQUENCE, helpers)
