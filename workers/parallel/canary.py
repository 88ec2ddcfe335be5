"""Do the ranks of a group sample the same tokens for the same requests?

They should: each gets the same plans, and the tokens come from all of them.  A
rank whose memory or arithmetic is broken would poison streams in silence.  So
every INTERVAL steps each rank lays down what it has sampled in memory that they
share, and compares what all laid down an interval ago: nobody waits for it.

Memory, of each rank: two entries, used in turns, of 64-bit words:

    step, number of rows, then the rows: request | token + 1 << 32

A step is written last.  Ranks are never an interval apart: their collectives and
the plan ring keep them within a few steps.  (x86-64's memory order, as in
ipc/shared_memory.py.)
"""

from __future__ import annotations

import logging

import numpy as np

from ...ipc.plan import Int32Array
from ...ipc.shared_memory import map_memory

INTERVAL = 64
_HEADER = 2
_SHOWN = 8


class RanksDisagree(RuntimeError):
    """Two ranks have sampled different tokens; the group cannot go on."""


def canary_bytes(ranks: int, max_num_seqs: int) -> int:
    """Memory for the entries of all ranks."""
    return ranks * 2 * (_HEADER + max_num_seqs) * 8


class Canary:
    """Of one rank; memory: a descriptor of canary_bytes(ranks, max_num_seqs), zeroed."""

    def __init__(self, memory: int, rank: int, ranks: int, max_num_seqs: int) -> None:
        words = np.frombuffer(map_memory(memory).view, np.uint64)
        self._entries = words.reshape(ranks, 2, _HEADER + max_num_seqs)
        self._rank = rank

    def check(self, step: int, rows: Int32Array) -> None:
        """rows: [R, 3] int32 (request, count, token), of this rank's step.

        Raises RanksDisagree, after both sides have been written to the log.
        """
        if step % INTERVAL:
            return
        turn = step // INTERVAL % 2
        mine = self._entries[self._rank, turn]
        words = rows.astype(np.uint64)
        mine[_HEADER : _HEADER + len(rows)] = words[:, 0] | (words[:, 2] + words[:, 1]) << 32
        mine[1] = len(rows)
        mine[0] = step
        self._compare(step - INTERVAL, 1 - turn)

    def _compare(self, step: int, turn: int) -> None:
        entries = self._entries[:, turn]
        count = int(entries[self._rank, 1])
        there = np.flatnonzero(entries[:, 0] == step)
        seen = entries[:, 1 : _HEADER + count]
        same = (seen[there] == seen[self._rank]).all(axis=1)
        if step <= 0 or same.all():
            return
        other = int(there[~same][0])
        both = [self._told(rank, turn) for rank in (self._rank, other)]
        for rank, told in zip((self._rank, other), both, strict=True):
            logging.error("step %d, rank %d sampled (request, token): %s", step, rank, told)
        theirs = set(both[1])
        differ = [row for row in both[0] if row not in theirs]
        raise RanksDisagree(
            f"ranks {self._rank} and {other} disagree about step {step}: {len(both[0])} and "
            f"{len(both[1])} rows, and of the first's {len(differ)} are not the other's, such as "
            f"(request, token) {differ[:_SHOWN]}; a GPU or its memory may be broken"
        )

    def _told(self, rank: int, turn: int) -> list[tuple[int, int]]:
        """What a rank laid down; a token of -1 could not be sampled."""
        entry = self._entries[rank, turn]
        words = entry[_HEADER : _HEADER + int(entry[1])]
        low = np.uint64(0xFFFFFFFF)
        return [(int(word & low), int(word >> np.uint64(32)) - 1) for word in words]
