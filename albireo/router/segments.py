"""The journal's files: framed records in a mapping of the page cache.

    segment = "ALBJRNL1" or "ALBJFST1", record, record, ..., zeros
    record  = u32 length, u32 crc32 of the payload (begun with the length), payload

A record is in the page cache, where the death of this process leaves it, as soon
as append() has returned: a copy in memory, without a system call.  Its length is
written last.  Reading stops at the first record that is not whole.

ALBJFST1 is the first segment of a router's journal, once it has all that the files
before it have: they count for nothing then, whichever of them are still there.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import os
import struct
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

MAGIC = b"ALBJRNL1"
FIRST_MAGIC = b"ALBJFST1"
SUFFIX = ".journal"
RECORD_HEAD = struct.Struct("<II")
AHEAD_BYTES = 1024 * 1024
"""Of pages that are prepared ahead of the next record."""

Data = bytes | mmap.mmap

_PAGE = mmap.PAGESIZE
_POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, from Linux 5.14 on
_log = logging.getLogger(__name__)
_madvise = ctypes.CDLL(None, use_errno=True).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)


class Segment:
    """One file, as it is written: `size` bytes on the disk from the start, so that no append can
    find it full.

    number: its place in the sequence, which is its name.
    at: where the next record goes.

    Raises OSError when it cannot be made.
    """

    def __init__(self, directory: Path, number: int, size: int) -> None:
        self.number = number
        self.at = len(MAGIC)
        self.path = directory / f"{number:08d}{SUFFIX}"
        self._size = size
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        file = os.open(self.path, flags, 0o600)
        try:
            os.posix_fallocate(file, 0, size)
            self._map = mmap.mmap(file, size)
        except (OSError, ValueError):
            self.remove()
            raise
        finally:
            os.close(file)
        self._map[: self.at] = MAGIC
        self._populated = 0

    @property
    def room(self) -> int:
        """Longest payload that can be appended."""
        return self._size - self.at - RECORD_HEAD.size

    def append(self, payload: bytearray) -> None:
        """Adds a record, for which there must be room."""
        length = len(payload)
        begin = self.at + RECORD_HEAD.size
        self._map[begin : begin + length] = payload
        RECORD_HEAD.pack_into(self._map, self.at, length, zlib.crc32(payload, length))
        self.at = begin + length

    def populate(self, ahead: int) -> None:
        """Has the kernel prepare the pages of the next `ahead` bytes, so that append() need not
        wait for it; for another thread.  Where the kernel cannot, append() faults them in."""
        begin = max(self._populated, self.at) // _PAGE * _PAGE
        end = min(self.at + ahead, self._size) // _PAGE * _PAGE
        if end > begin:
            first = ctypes.c_char.from_buffer(self._map, begin)
            _madvise(ctypes.addressof(first), end - begin, _POPULATE_WRITE)
            self._populated = end

    def sync(self) -> None:
        """Waits until all of it is on the disk; for another thread."""
        file = os.open(self.path, os.O_RDONLY)
        try:
            os.fdatasync(file)
        finally:
            os.close(file)

    def void(self) -> None:
        """Nobody finds a record in it any more: at once, and on a full disk, too."""
        self._map[: len(MAGIC)] = bytes(len(MAGIC))

    def make_first(self) -> None:
        """The files before it count for nothing any more; all at once."""
        self._map[: len(MAGIC)] = FIRST_MAGIC

    def remove(self) -> None:
        """Deletes the file.  What is mapped of it goes with the last reference."""
        with contextlib.suppress(FileNotFoundError):
            self.path.unlink()


class Files:
    """Makes and deletes segments, on a thread of its own.

    first: number of the first one.
    sync_s: how often the disk has to have everything; 0 = when the kernel likes.
    """

    def __init__(self, directory: Path, size: int, first: int, sync_s: float) -> None:
        self._directory = directory
        self._size = size
        self._next = first
        self._sync_s = sync_s
        self._making = threading.Lock()
        self._spare: Segment | None = None
        self._current: Segment
        self._retired: list[Segment] = []
        self._closing = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="journal", daemon=True)

    def start(self, current: Segment) -> None:
        self._current = current
        self._thread.start()
        self._wake.set()

    def take(self) -> Segment:
        """The next segment; made now if that has not been done yet.  Raises OSError."""
        with self._making:
            segment, self._spare = self._spare or self._make(), None
        self._current = segment
        self._wake.set()
        return segment

    def retire(self, segment: Segment) -> None:
        """It has nothing any more that is not in a later one: it can be deleted."""
        self._retired.append(segment)
        self._wake.set()

    def wake(self) -> None:
        """Records have been added: there are pages to prepare."""
        self._wake.set()

    def close(self) -> None:
        """Ends the thread, and deletes what is retired."""
        self._closing = True
        self._wake.set()
        if self._thread.is_alive():  # else there was no file to begin with
            self._thread.join()

    def _run(self) -> None:
        while not self._closing:
            self._wake.wait(self._sync_s or None)
            self._wake.clear()
            try:
                self._work()
            except OSError as error:
                _log.error("the journal's files: %s", error)
        with self._making:
            self._remove_retired()
            if self._spare is not None:
                self._spare.remove()

    def _work(self) -> None:
        self._current.populate(AHEAD_BYTES)
        if self._sync_s:
            self._current.sync()
        with self._making:
            self._remove_retired()
            if self._spare is None and not self._closing:
                self._spare = self._make()

    def _make(self) -> Segment:
        self._remove_retired()
        segment = Segment(self._directory, self._next, self._size)
        self._next += 1
        return segment

    def _remove_retired(self) -> None:
        if self._retired and self._sync_s:
            self._current.sync()  # what has been written anew is there
        while self._retired:
            self._retired.pop().remove()


def segments_in(directory: Path) -> list[Path]:
    """The files of segments, oldest first."""
    return sorted(directory.glob(f"[0-9]*{SUFFIX}"))


def mapped(path: Path) -> Data:
    """The bytes of a file, as they are looked at.  Raises OSError."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:
            return b""
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def is_first(data: Data) -> bool:
    """Whether what is before this segment counts for nothing."""
    return data[: len(MAGIC)] == FIRST_MAGIC


def payloads(data: Data) -> Iterator[bytes]:
    """The payloads of a segment's records, up to the first that is not whole."""
    if data[: len(MAGIC)] not in (MAGIC, FIRST_MAGIC):
        return
    at = len(MAGIC)
    while at + RECORD_HEAD.size <= len(data):
        length, crc = RECORD_HEAD.unpack_from(data, at)
        begin = at + RECORD_HEAD.size
        payload = data[begin : begin + length]
        if not length or len(payload) < length or zlib.crc32(payload, length) != crc:
            return
        yield payload
        at = begin + length
