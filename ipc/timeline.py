"""Timelines: what every actor has done lately, in shared memory, always on.

An actor writes a record of 32 bytes for each stage of its work; a record costs
well under a microsecond and no system call.  The supervisor makes the memory
and keeps it, so a dead actor's last records can still be read; a restarted
actor gets new memory.  Whoever may look into the supervisor's /proc may read,
at any time, without the writer noticing:

    <runtime dir>/timeline/<actor>.<incarnation>  ->  /proc/<supervisor>/fd/<n>

A memfd and not a plain file: the kernel writes the dirty pages of a mapped file
back to its disk, and a record that meets that waits for the disk.

    line 0      magic, capacity, number of tracks
    line 1+t    track t: records written so far
    4096        records of track 0, then of track 1, ...; record i of a track is in place
                i % capacity

One thread writes a track.  A record is written first and counted afterwards;
stores are seen in their order (shared_memory.py).  So a reader that copies
records and reads the count again knows which of them may have been overwritten
meanwhile, and drops those.
"""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .shared_memory import CACHE_LINE, WORDS_PER_LINE, create, map_memory
from .stages import Stage

DIRECTORY = "timeline"
CAPACITY = 32_768
"""Records of a track; a power of two."""
ACTOR, DEVICE, RESULTS = 0, 1, 2
"""Tracks: the actor's main loop; of a worker also what its device does, and the thread that
waits for it and hands out results."""
WORKER_TRACKS = 3
NO_STEP = 0xFFFFFFFF

RECORD = np.dtype(
    [
        ("start_ns", "<i8"),
        ("end_ns", "<i8"),
        ("step", "<u4"),
        ("detail", "<u4"),
        ("sequence", "<u4"),
        ("stage", "<u2"),
        ("zero", "<u2"),
    ]
)
"""start_ns, end_ns: CLOCK_MONOTONIC.  step: its low 32 bits, or NO_STEP."""
Records = npt.NDArray[np.void]

_RECORD = struct.Struct("@qqIIIHH")  # Native packing is twice as fast, and the same bytes.
_LOW = 0xFFFFFFFF
_MASK = CAPACITY - 1
_MAGIC = 0x314C544F45524942  # "BIREOTL1"
_FIRST = 4096


class TimelineError(RuntimeError):
    """There is no timeline, or it is not one that this version reads."""


def create_timeline(actor: str, tracks: int) -> int:
    """A memfd with an empty timeline in it; the caller closes it."""
    fd = create(f"{actor}.timeline", _FIRST + tracks * CAPACITY * RECORD.itemsize)
    words = map_memory(fd).words
    for index, word in enumerate((_MAGIC, CAPACITY, tracks)):
        words[index] = word
    return fd


class Recorder:
    """Writes one track of an actor's timeline; used by one thread."""

    __slots__ = ("_count", "_first", "_pack", "_view", "_words", "_written")

    def __init__(self, fd: int, track: int = ACTOR) -> None:
        memory = map_memory(fd, populate=True)  # else every 128th record would fault
        if memory.nbytes < _FIRST + (track + 1) * CAPACITY * RECORD.itemsize:
            raise TimelineError(f"a timeline of {memory.nbytes} bytes has no track {track}")
        self._view = memory.view
        self._words = memory.words
        self._count = (1 + track) * WORDS_PER_LINE
        self._first = _FIRST + track * CAPACITY * RECORD.itemsize
        self._written = memory.words[self._count]
        self._pack = _RECORD.pack_into

    @classmethod
    def of(cls, fds: Mapping[str, int], track: int = ACTOR) -> Recorder:
        """Into the memory that the actor was started with ("timeline"), or into its own."""
        if "timeline" in fds:
            return cls(fds["timeline"], track)
        fd = create_timeline("unread", track + 1)
        try:
            return cls(fd, track)
        finally:
            os.close(fd)

    def record(self, stage: Stage, step: int, start_ns: int, end_ns: int, detail: int = 0) -> None:
        """Times by time.monotonic_ns() (which perf_counter_ns() is, on Linux)."""
        written = self._written
        self._pack(
            self._view,
            self._first + (written & _MASK) * 32,
            start_ns, end_ns, step & _LOW, detail, written & _LOW, stage, 0,
        )  # fmt: skip
        self._written = self._words[self._count] = written + 1


class TimelineReader:
    """An actor's timeline, seen from another process.  Raises TimelineError, OSError."""

    def __init__(self, path: Path | str) -> None:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            memory = mmap.mmap(fd, os.fstat(fd).st_size, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise TimelineError(f"{path} is no timeline: {error}") from None
        finally:
            os.close(fd)
        head = np.frombuffer(memory, np.uint64, 3) if len(memory) >= _FIRST else np.zeros(3)
        capacity, tracks = int(head[1]), int(head[2])
        if int(head[0]) != _MAGIC or len(memory) < _FIRST + tracks * capacity * RECORD.itemsize:
            raise TimelineError(f"{path} is no timeline of this version")
        self.tracks = tracks
        self._capacity = capacity
        lines = 1 + tracks
        self._counts: npt.NDArray[Any] = np.frombuffer(
            memory, np.uint64, lines * WORDS_PER_LINE
        ).reshape(lines, -1)[1:, 0]
        self._records = np.frombuffer(memory, RECORD, tracks * capacity, _FIRST)

    def written(self, track: int = ACTOR) -> int:
        """Records written to the track so far."""
        return int(self._counts[track])

    def newest(self, track: int = ACTOR, count: int = CAPACITY) -> Records:
        """A copy of the newest records, oldest first: at most `count`, none of them torn."""
        written = self.written(track)
        first = max(0, written - min(count, self._capacity))
        ring = self._records[track * self._capacity :][: self._capacity]
        begin, end = first % self._capacity, written % self._capacity
        if begin < end or first == written:
            copy = ring[begin:end].copy()
        else:
            copy = np.concatenate((ring[begin:], ring[:end]))
        # The writer may be in the middle of the record behind the last one that it has counted.
        overwritten = self.written(track) + 1 - self._capacity - first
        copy = copy[max(0, overwritten) :]
        expected = np.arange(written - len(copy), written, dtype=np.uint64) & np.uint64(_LOW)
        whole: Records = copy[copy["sequence"] == expected]
        return whole


assert RECORD.itemsize == _RECORD.size == 32 and CACHE_LINE == 8 * WORDS_PER_LINE
