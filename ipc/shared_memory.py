"""Anonymous shared memory: memfds that are created, handed to children, and mapped.

The descriptor is the only name such memory has, so nothing is left behind in
/dev/shm and its size limit does not apply.  Rings (ring.py) and the ranks'
collectives (workers/parallel) live in it.

Counters are 64-bit words, each written by one process alone; others wait for
them here: a bounded spin that yields the core, then a futex.

All of this relies on x86-64's memory order: aligned 8-byte loads and stores are
single accesses, and stores are seen in the order they were made (total store
order).  CPython reads and writes an item of Mapping.words as one such access.
On other machines create and map_memory refuse.
"""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import platform
import time
from collections.abc import Callable

from .futex import futex_wait, futex_wake

CACHE_LINE = 64
WORDS_PER_LINE = CACHE_LINE // 8


Spin = Callable[[int, int, float], None]
"""(address, target, end_s): returns once the counter there has reached target, or at end_s."""


class UnsupportedMachine(RuntimeError):
    """The processor's memory order is not the one that the shared-memory code is written for."""


def create(name: str, nbytes: int) -> int:
    """A zeroed memfd of `nbytes` whose size is sealed; returns its descriptor (close-on-exec).

    `name` shows in /proc/<pid>/maps.  Pages take memory only once they are touched.
    """
    _require_x86_64()
    if nbytes < 1:
        raise ValueError(f"shared memory {name} needs at least 1 byte, not {nbytes}")
    fd = os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, nbytes)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd


class Mapping:
    """A memfd in this process's address space, until the last view of it is gone.

    view: all of it, as bytes.  words: its 64-bit words, unsigned; index =
    offset / 8.  address: where it starts, for futexes.  The descriptor may be
    closed afterwards.
    """

    __slots__ = ("_exported", "address", "nbytes", "view", "words")

    def __init__(self, memory: mmap.mmap) -> None:
        self.nbytes = len(memory)
        self.view = memoryview(memory)
        self.words = self.view[: self.nbytes // 8 * 8].cast("Q")
        self._exported = ctypes.c_char.from_buffer(memory)
        self.address = ctypes.addressof(self._exported)

    def wait_until(
        self,
        word: int,
        target: int,
        spin_end_s: float,
        deadline_s: float,
        spin: Spin | None = None,
    ) -> bool:
        """Waits until the counter words[word] has reached `target`; False when it is too late.

        Spins until `spin_end_s`, then sleeps until `deadline_s`, both by time.monotonic().
        spin: how, where another thread of the process must not wait for the interpreter meanwhile.
        Relies on a wake(word) after every change of the counter.
        """
        words = self.words
        spin_end_s = min(spin_end_s, deadline_s)
        while words[word] < target and time.monotonic() < spin_end_s:
            if spin is None:
                os.sched_yield()
            else:
                spin(self.address + word * 8, target, spin_end_s)
        while (seen := words[word]) < target:
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return False
            futex_wait(self.address + word * 8, seen, left_s)
        return True

    def wake(self, word: int) -> None:
        """Wakes everybody who waits for words[word]."""
        futex_wake(self.address + word * 8)


def map_memory(fd: int, *, populate: bool = False) -> Mapping:
    """Maps a memfd whole, for reading and writing.

    populate: allocate every page now, so that no first touch costs a page fault.
    """
    _require_x86_64()
    flags = mmap.MAP_SHARED | (mmap.MAP_POPULATE if populate else 0)
    return Mapping(mmap.mmap(fd, os.fstat(fd).st_size, flags=flags))


def round_up(nbytes: int, unit: int) -> int:
    """The next multiple of `unit` that is not below `nbytes`."""
    return -(-nbytes // unit) * unit


def _require_x86_64() -> None:
    machine = platform.machine()
    if machine not in ("x86_64", "AMD64"):
        raise UnsupportedMachine(
            f"this machine is {machine}: the rings rely on the memory order of x86-64 "
            "(total store order) and run there only"
        )
