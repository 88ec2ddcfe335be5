"""The shared memory of a group's collectives: its layout, and how the ranks meet on it.

    line r        rank r: arrivals, pid, what it brings (even), (odd)
    from a page   slabs [2, size, slab_bytes]: even and odd collectives, by rank

A collective is: write your slab, arrive, wait until all have, read any slab.
One meeting is enough, since a slab is written again two collectives later: a
rank that is there has seen all others arrive at the one between, so they have
done with the slab.  No torch here: the supervisor sizes the memory with it.
"""

from __future__ import annotations

import mmap
import os
import time

from ...ipc.liveness import describe_process
from ...ipc.shared_memory import CACHE_LINE, WORDS_PER_LINE, Mapping, map_memory, round_up

OPERATIONS = ("all_reduce", "share_logits", "all_gather_int32")
ALL_REDUCE, SHARE_LOGITS, ALL_GATHER_INT32 = range(3)

ROW_MESSAGE_WORDS = 518
"""The most that a rank tells of a row that is sampled, where it does not bring its logits."""

# Words of a rank's line.
_ARRIVALS, _PID, _BRINGS = 0, 1, 2
_OPERATION_SHIFT = 48


class CollectiveTimeout(TimeoutError):
    """A rank has not arrived at a collective in time; the text names it."""


class CollectiveMismatch(RuntimeError):
    """Two ranks do different things at the same collective: they have diverged."""


def slab_bytes(size: int, max_tokens: int, hidden: int, max_rows: int, vocab: int) -> int:
    """The most bytes that one rank brings to a collective (float32 throughout).

    max_tokens: rows of a step's activations [max_tokens, hidden].
    max_rows: rows that are sampled in a step, logits [max_rows, vocab / size] or
    what sampling/candidates.py makes of them.
    """
    row = max(-(-vocab // size), ROW_MESSAGE_WORDS)
    return 4 * max(max_tokens * hidden, max_rows * row)


def shared_bytes(size: int, max_tokens: int, hidden: int, max_rows: int, vocab: int) -> int:
    """Bytes of the memfd of a group of `size` ranks; see slab_bytes.

    Only pages that are touched take memory.
    """
    return _memory_bytes(size, slab_bytes(size, max_tokens, hidden, max_rows, vocab))


class Slabs:
    """One rank's end of the memory; made once by each rank, over the memory of a new group.

    max_bytes: as slab_bytes, the same on all ranks.  timeout_s: how long a rank
    waits for the others at a collective.  spin_us: how much of that it spins.
    """

    def __init__(
        self, memfd: int, rank: int, size: int, max_bytes: int, timeout_s: float, spin_us: int
    ) -> None:
        if not 0 <= rank < size:
            raise ValueError(f"rank {rank} is not one of {size}")
        memory = map_memory(memfd)
        needed = _memory_bytes(size, max_bytes)
        if memory.nbytes < needed:
            raise ValueError(
                f"collectives of {size} ranks and up to {max_bytes} bytes need {needed} bytes of "
                f"shared memory; descriptor {memfd} has {memory.nbytes}"
            )
        self._memory: Mapping = memory
        self._rank = rank
        self._timeout_s = timeout_s
        self._spin_s = spin_us * 1e-6
        self._lines = [peer * WORDS_PER_LINE for peer in range(size)]
        self._line = self._lines[rank]
        self._count = 0
        self.stride = _stride(max_bytes)
        first = _first_slab(size)
        self.memory = memory.view[first : first + 2 * size * self.stride]
        self._claim()

    @property
    def parity(self) -> int:
        """Which of the two sets of slabs the next collective uses."""
        return (self._count + 1) & 1

    def meet(self, operation: int, nbytes: int) -> None:
        """Arrives at the next collective, with `nbytes` in the slab, and waits for all ranks.

        Raises CollectiveTimeout and CollectiveMismatch.
        """
        words = self._memory.words
        count = self._count = self._count + 1
        brings = _BRINGS + (count & 1)
        brought = operation << _OPERATION_SHIFT | nbytes
        words[self._line + brings] = brought
        words[self._line] = count
        self._memory.wake(self._line)
        start = 0.0
        for line in self._lines:
            if words[line] < count:
                start = start or time.monotonic()
                if not self._memory.wait_until(
                    line, count, start + self._spin_s, start + self._timeout_s
                ):
                    raise CollectiveTimeout(self._describe_missing(brought))
            if words[line + brings] != brought:
                raise CollectiveMismatch(
                    f"collective {count}: rank {self._rank} does {_describe(brought)}, but rank "
                    f"{line // WORDS_PER_LINE} {_describe(words[line + brings])}"
                )

    def _claim(self) -> None:
        words, line = self._memory.words, self._line
        if words[line + _PID]:
            raise ValueError(
                f"rank {self._rank} was taken before ({describe_process(words[line + _PID])}): "
                "a new group needs new memory"
            )
        words[line + _PID] = os.getpid()

    def _describe_missing(self, brought: int) -> str:
        missing = []
        for peer, line in enumerate(self._lines):
            arrivals, pid = self._memory.words[line : line + 2]
            if arrivals < self._count:
                missing.append(f"rank {peer} ({describe_process(pid)}; at collective {arrivals})")
        return (
            f"rank {self._rank} waited {self._timeout_s:.3f} s at collective {self._count}, "
            f"{_describe(brought)}, for {' and '.join(missing) or 'a rank that has just come'}"
        )


def _describe(brought: int) -> str:
    nbytes = brought & ((1 << _OPERATION_SHIFT) - 1)
    return f"{OPERATIONS[brought >> _OPERATION_SHIFT]} of {nbytes} bytes"


def _stride(max_bytes: int) -> int:
    return round_up(max(max_bytes, 1), CACHE_LINE)


def _first_slab(size: int) -> int:
    return round_up(size * CACHE_LINE, mmap.PAGESIZE)


def _memory_bytes(size: int, max_bytes: int) -> int:
    return _first_slab(size) + 2 * size * _stride(max_bytes)
