"""The journal: what a new router has to know to go on with the requests of a dead one.

    newer  |Opened|Accepted|Step|Step|Accepted|Step ...        <- records are added here
    older  |Opened|Accepted|Step|...|Continued|                <- is being emptied

Accepted is a request with the tokens that it has so far, Step what one batch of
output added to all of them.  A record is written before its tokens go to a
client: so no client has a token that is not here.  When `newer` is full it
becomes `older`, and what is in flight is written anew, some of it with each
record, until the file can be deleted: so the size is bounded, and no step waits.

Records are described in records.py, and read again in replay.py.  What may wait for
the disk is left to a thread (segments.py).
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
from collections import OrderedDict
from pathlib import Path

import msgspec

from .records import Accepted, Continued, Opened, Record, Step
from .replay import replay
from .segments import AHEAD_BYTES, RECORD_HEAD, Files, Segment, mapped, segments_in

SEGMENTS = 3
"""Files that there can be: the newer one, the older one, and the next."""
_COPY_BYTES = 64 * 1024
"""Of requests that are written anew with each Step, at least."""
_CONTINUED_BYTES = 64
_INT_BYTES = 5
"""Of a token, and of the length of a list, at most."""
_MAX_NUMBER = 2**63 - 1
_LOCK_S = 2.0

_log = logging.getLogger(__name__)


class JournalError(Exception):
    """The journal cannot be used, or no longer; the text says why."""


class Journal:
    """directory: made if it is not there; one router at a time can have it.
    max_bytes: of all its files together.
    sync_s: how often the disk has to have everything; 0 = when the kernel likes.
    restarted: this node's router before has used it: where no file can be made now, those that
        there are count until what they have goes on, and no other request is noted.

    found: the requests that were in flight, with all their tokens.  found_ended: those that had
        ended a moment before; their clients may lack the end.  They are in this journal, too.

    Raises JournalError.
    """

    def __init__(
        self,
        directory: Path,
        max_bytes: int,
        sync_s: float,
        opened: Opened,
        restarted: bool = False,
    ) -> None:
        self._size = max_bytes // SEGMENTS // 4096 * 4096
        self._opened = opened
        self._encoder = msgspec.msgpack.Encoder()
        self._buffer = bytearray(64 * 1024)
        self._last_number = 0
        self._live: OrderedDict[int, Accepted] = OrderedDict()
        self._born: dict[int, int] = {}
        """Of live requests: the number of the segment that they were last written to."""
        self._needs: dict[int, int] = {}
        """Of live requests: the bytes that are reserved for them."""
        self._reserved = self._freed = 0
        self._ended: list[int] = []
        self._gone: list[int] = []
        self._older: list[Segment] = []
        """One at most, as long as it is not off."""
        self._before: list[Path] = []
        """Files of the router before, where this one could make none."""
        self._says_full = True
        self._off = False
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = _lock(directory)
            old = segments_in(directory)
            self.found, self.found_ended = replay([mapped(path) for path in old], opened)
            self._files = Files(directory, self._size, 1 + _last(old), sync_s)
            try:
                first = self._newer = self._begin()
            except OSError as error:
                if not restarted:
                    raise
                self._before = old
                self._give_up(error)
                if not (self.found or self.found_ended):
                    self._void()
                return
            first.void()  # until it has everything, what it replaces counts
            for record in (*self.found, *self.found_ended):  # those first for which room must be
                self.accept(record)
            for record in self.found_ended:
                self._end_again(record)
            self.step([])
            self._files.start(self._newer)
            self._replace(old, first, sync_s)
        except OSError as error:
            raise JournalError(f"--journal {directory} cannot be used: {error}") from None

    def accept(self, record: Accepted) -> bool:
        """Notes a request, and gives it its number; False when there is no room for it.

        `record.tokens` grows with the request: what is written anew is read there.
        """
        record.number = 0
        need = self._most_bytes(record)
        if self._reserved + need > self._size // 2:
            self.step([])  # what has ended must be noted before its room is given away
        if self._off or self._reserved + need > self._size // 2:
            self._say_full(need)
            return False
        self._says_full = True
        record.number = self._last_number + 1
        self._last_number += max(record.tokens, default=0) + 1
        self._reserved += need
        self._needs[record.number] = need
        self._copy(2 * self._write(record))
        return True

    def step(self, tokens: list[tuple[int, int, list[int]]]) -> None:
        """Notes new tokens, before clients see them: (number of the answer, index, ids)."""
        if tokens or self._ended or self._gone or self._freed:
            written = self._write(Step(tokens, self._ended, self._gone))
            if self._off and self._gone:
                self._void()
            self._ended.clear()
            self._gone.clear()
            self._reserved -= self._freed
            self._freed = 0
            self._copy(2 * written + _COPY_BYTES)

    def ended(self, number: int) -> None:
        """An answer has ended; noted with the next step."""
        self._ended.append(number)

    def forget(self, record: Accepted, *, gone: bool) -> None:
        """A request is over: all its answers have ended, or nobody is to go on with it (`gone`),
        even where they have."""
        if self._live.pop(record.number, None) is not None:
            del self._born[record.number]
            self._freed += self._needs.pop(record.number)
        if gone and record.number:
            self._gone.append(record.number)

    def close(self) -> None:
        """Leaves no file behind when no request is in flight."""
        self.step([])
        if not self._live:
            for segment in self._segments():
                self._files.retire(segment)
        self._files.close()
        os.close(self._lock)

    def _replace(self, old: list[Path], first: Segment, sync_s: float) -> None:
        """Wherever this is cut, a replay finds all that is in flight, and nobody who is gone."""
        if sync_s:
            first.sync()  # before it counts
        first.make_first()
        if sync_s:
            first.sync()  # before what it replaces is deleted
        for path in old:
            path.unlink()

    def _end_again(self, record: Accepted) -> None:
        """It is written here whole, and waits for nothing."""
        if record.number:
            self._ended += [record.number + choice for choice in record.tokens]
            self.forget(record, gone=False)

    # ------------------------------------------------------------------ writing
    def _write(self, record: Record) -> int:
        """Appends a record, in a new segment where this one is full; returns its bytes."""
        if self._off:
            return 0
        try:
            if not (length := self._append(record)):
                self._turn()
                if not (length := self._append(record)):
                    raise JournalError(f"a record needs more than a file of {self._size} bytes")
        except (OSError, JournalError) as error:
            self._give_up(error)
            return 0
        return length

    def _give_up(self, error: Exception) -> None:
        self._off = True
        _log.error(
            "the journal cannot be written any more, requests end with this router: %s", error
        )

    def _append(self, record: Record) -> int:
        """Appends a record to this segment; returns its bytes, 0 when there is no room."""
        buffer, newer = self._buffer, self._newer
        self._encoder.encode_into(record, buffer)
        if len(buffer) > newer.room - _CONTINUED_BYTES:
            return 0
        before = newer.at
        newer.append(buffer)
        if (before ^ newer.at) & -(AHEAD_BYTES // 2):
            self._files.wake()
        if isinstance(record, Accepted):
            self._live[record.number] = record
            self._live.move_to_end(record.number)
            self._born[record.number] = newer.number
        return len(buffer)

    def _copy(self, most: int) -> None:
        """Writes anew what the older segment still holds, as far as this one has room; gives it up
        when that is all."""
        while self._older and most > 0 and not self._off:
            number = next(iter(self._live), 0)
            if not number or self._born[number] > self._older[0].number:
                self._files.retire(self._older.pop(0))
            elif written := self._append(self._live[number]):
                most -= written
            else:
                break

    def _turn(self) -> None:
        """The newer segment is full: half of the next one is enough for all that is in flight."""
        self._encoder.encode_into(Continued(), self._buffer)
        self._newer.append(self._buffer)
        full, self._newer = self._newer, self._begin()
        self._copy(self._size)
        self._older.append(full)
        if len(self._older) > 1:
            raise JournalError(f"what is in flight needs more than a file of {self._size} bytes")

    def _void(self) -> None:
        """Who is gone cannot be noted any more: what would bring them back counts for nothing."""
        for segment in self._segments():
            segment.void()
        for path in self._before:
            path.unlink(missing_ok=True)

    def _segments(self) -> list[Segment]:
        """Its own: none where it could not be begun."""
        return [*self._older, self._newer] if hasattr(self, "_newer") else []

    def _begin(self) -> Segment:
        segment = self._files.take()
        segment.append(bytearray(self._encoder.encode(self._opened)))
        return segment

    def _most_bytes(self, record: Accepted) -> int:
        """Bytes of a request that is written as a whole, at its end; however many tokens it has."""
        bare = msgspec.structs.replace(record, number=_MAX_NUMBER, tokens={})
        tokens = len(record.tokens) * (2 + record.submit.max_tokens) * _INT_BYTES
        return RECORD_HEAD.size + len(self._encoder.encode(bare)) + tokens

    def _say_full(self, need: int) -> None:
        if self._says_full and not self._off:
            self._says_full = False
            _log.warning(
                "the journal is full: %d requests may need %d of %d bytes; those that come now "
                "end with the router (--journal-max-mib)",
                len(self._live), self._reserved + need, self._size // 2,
            )  # fmt: skip


def _last(segments: list[Path]) -> int:
    return max((int(path.stem) for path in segments), default=0)


def _lock(directory: Path) -> int:
    """Keeps other routers away.  Raises OSError; the router before this one may still be dying."""
    lock = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    deadline = time.monotonic() + _LOCK_S
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return lock
        except BlockingIOError:
            if time.monotonic() > deadline:
                os.close(lock)
                raise OSError("another node uses it") from None
            time.sleep(0.02)
