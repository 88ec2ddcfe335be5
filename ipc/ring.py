"""A ring of frames in shared memory: one writer, several readers, each reads every frame.

The hot path of a group: plans go from the scheduler to the ranks, results from
rank 0 to the scheduler and the detokenizer (rings.py names and sizes the two).

    line 0        magic, frames, frame bytes, number of readers
    line 1        writer:  published, 0, pid
    line 2 + i    reader i: released, taken, pid
    then, for each frame, from a line's start:
                  sequence, length  |  payload: frame_bytes, rounded up to lines

A line is 64 bytes, so nobody's counter shares a cache line with another's.
Sequence numbers have 64 bits and count from 1: `published` is the last frame
written, `released` the last one a reader has done with, `taken` the last one
it was given.  Frame s lies in place (s - 1) % frames; the writer may fill it
once every reader has released s - frames.  Only its owner writes a line, and
payload, header, counter are stored in this order, which x86-64 keeps
(shared_memory.py): nobody needs a lock.

Who waits spins for at most spin_us, then sleeps on the futex of the counter it
waits for.  Whoever moves a counter always wakes.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Sequence

import msgspec

from .liveness import describe_process, is_alive
from .shared_memory import (
    CACHE_LINE,
    WORDS_PER_LINE,
    Mapping,
    Spin,
    create,
    map_memory,
    round_up,
)

_MAGIC = 0x31474E4952424C41  # "ALBRING1"
_WRITER = WORDS_PER_LINE
_PUBLISHED = _WRITER
_FIRST_READER = 2 * WORDS_PER_LINE
# Words of a writer's or reader's line.
_COUNTER, _TAKEN, _PID = 0, 1, 2


class RingError(RuntimeError):
    """The ring was used against its rules, or its memory is not this ring's."""


class RingTimeout(TimeoutError):
    """A wait reached its deadline; the text names who was waited for, and where it stands."""


class FrameTooLarge(ValueError):
    """A message does not fit the ring's frames."""


class RingSpec(msgspec.Struct, frozen=True):
    """A ring's shape; writer and readers must agree on it.

    name: for errors, e.g. "g0.plan".  frames: how many the ring holds.
    frame_bytes: the largest payload.  readers: their names, unique.
    """

    name: str
    frames: int
    frame_bytes: int
    readers: tuple[str, ...]

    def validate(self) -> None:
        """Raises ValueError for a shape that cannot be."""
        if self.frames < 1 or self.frame_bytes < 1:
            raise ValueError(
                f"ring {self.name} needs at least 1 frame of 1 byte, "
                f"not {self.frames} of {self.frame_bytes}"
            )
        if not self.readers or len(set(self.readers)) != len(self.readers):
            raise ValueError(f"ring {self.name} needs readers of unique names, not {self.readers}")


def create_ring(spec: RingSpec) -> int:
    """A memfd with an empty ring in it, sealed against resizing; the caller closes it."""
    spec.validate()
    fd = create(spec.name, _Layout(spec).nbytes)
    map_memory(fd).words[:4] = memoryview(_shape(spec)).cast("Q")
    return fd


class RingWriter:
    """The writing side, in one process.  events: eventfds of readers that poll, one each."""

    def __init__(
        self, spec: RingSpec, fd: int, events: Sequence[int] = (), spin_us: int = 0
    ) -> None:
        memory = _attach(spec, fd)
        layout = _Layout(spec)
        _claim(spec, memory.words, _WRITER, "writer")
        self._spec = spec
        self._memory = memory
        self._words = memory.words
        self._events = tuple(events)
        self._spin_s = spin_us * 1e-6
        self._headers = layout.headers
        self._frames = layout.payloads(memory)
        self._sequence = memory.words[_PUBLISHED]
        self._free_until = 0
        self._reserved = False

    def reserve(self, timeout_s: float) -> memoryview:
        """The next frame, to be filled and published; until then the same one each time.

        Waits while the slowest reader has not released it.  Raises RingTimeout,
        which names every reader in the way.
        """
        if self._sequence >= self._free_until:
            self._wait_for_readers(timeout_s)
        self._reserved = True
        return self._frames[self._sequence % self._spec.frames]

    def publish(self, nbytes: int) -> None:
        """Shows the first `nbytes` of the reserved frame to all readers and wakes them."""
        if not self._reserved:
            raise RingError(f"ring {self._spec.name}: publish without reserve")
        if not 0 <= nbytes <= self._spec.frame_bytes:
            raise FrameTooLarge(
                f"ring {self._spec.name}: a message of {nbytes} bytes does not fit a frame "
                f"of {self._spec.frame_bytes}"
            )
        words = self._words
        header = self._headers[self._sequence % self._spec.frames]
        sequence = self._sequence + 1
        words[header] = sequence
        words[header + 1] = nbytes
        words[_PUBLISHED] = sequence
        self._sequence = sequence
        self._reserved = False
        self._memory.wake(_PUBLISHED)
        for event in self._events:
            os.eventfd_write(event, 1)

    def _wait_for_readers(self, timeout_s: float) -> None:
        """Returns once every reader has released the frame that the next one overwrites."""
        frames = self._spec.frames
        needed = self._sequence + 1 - frames
        start = time.monotonic()
        for index in range(len(self._spec.readers)):
            line = _FIRST_READER + index * WORDS_PER_LINE
            if not self._memory.wait_until(line, needed, start + self._spin_s, start + timeout_s):
                # Empty when the last of them has released between the deadline and now.
                full = _why_full(self._spec, self._words, needed)
                if full:
                    raise RingTimeout(
                        f"ring {self._spec.name}: writer waited {time.monotonic() - start:.3f} s "
                        f"to write frame {self._sequence + 1}; {full}"
                    )
        self._free_until = frames + min(
            self._words[_FIRST_READER + index * WORDS_PER_LINE]
            for index in range(len(self._spec.readers))
        )


class RingReader:
    """One reader, in one process.  Frames come in order, none is skipped.

    event: its eventfd, for readers that poll other descriptors too.  After
    readiness: clear_event(), then poll() until it returns None.
    at_once: frames it may have taken and not yet released.  spin: see Mapping.wait_until.
    """

    def __init__(
        self,
        spec: RingSpec,
        fd: int,
        reader: str,
        event: int | None = None,
        spin_us: int = 0,
        at_once: int = 1,
        spin: Spin | None = None,
    ) -> None:
        if reader not in spec.readers:
            raise RingError(
                f"ring {spec.name} has no reader {reader}; it has {', '.join(spec.readers)}"
            )
        memory = _attach(spec, fd)
        layout = _Layout(spec)
        self._line = _FIRST_READER + spec.readers.index(reader) * WORDS_PER_LINE
        _claim(spec, memory.words, self._line, f"reader {reader}")
        if event is not None:
            os.set_blocking(event, False)
        self._spec = spec
        self._reader = reader
        self._event = event
        self._spin_s = spin_us * 1e-6
        self._memory = memory
        self._words = memory.words
        self._headers = layout.headers
        self._frames = [frame.toreadonly() for frame in layout.payloads(memory)]
        self._at_once = at_once
        self._spin = spin
        self._released = self._taken = memory.words[self._line]
        self._words[self._line + _TAKEN] = self._taken

    @property
    def held(self) -> int:
        """Frames that were taken and are not released."""
        return self._taken - self._released

    @property
    def memory(self) -> memoryview:
        """The whole ring, as it is mapped here, for devices that read frames where they lie."""
        return self._memory.view

    @property
    def has_frame(self) -> bool:
        """Whether poll() would return one."""
        return self._words[_PUBLISHED] > self._taken

    def poll(self) -> memoryview | None:
        """The next frame (read-only, as long as its message), or None if there is none yet."""
        if self._words[_PUBLISHED] <= self._taken:
            return None
        return self._take()

    def wait(self, timeout_s: float, spins: bool = True) -> memoryview:
        """The next frame, as poll(), waiting for it.  Raises RingTimeout.

        spins: for spin_us, before it sleeps.
        """
        frame = self.poll()
        if frame is not None:
            return frame
        start = time.monotonic()
        wanted = self._taken + 1
        if not self._memory.wait_until(
            _PUBLISHED, wanted, start + self._spin_s * spins, start + timeout_s, self._spin
        ):
            published, _, pid = self._words[_WRITER : _WRITER + 3]
            raise RingTimeout(
                f"{self._who()} (pid {os.getpid()}) waited {time.monotonic() - start:.3f} s for "
                f"frame {wanted}; the writer ({describe_process(pid)}) has published {published}"
            )
        return self._take()

    def release(self) -> None:
        """Gives the oldest frame back; views of it must not be used any more."""
        if not self.held:
            raise RingError(f"{self._who()}: release without a frame")
        self._released += 1
        self._words[self._line] = self._released
        self._memory.wake(self._line)

    def why_full(self) -> str:
        """Who keeps the writer from its next frame, for errors; "" = nobody does."""
        needed = self._words[_PUBLISHED] + 1 - self._spec.frames
        return _why_full(self._spec, self._words, needed)

    def fileno(self) -> int:
        """Its eventfd, readable when frames were published since clear_event()."""
        if self._event is None:
            raise RingError(f"{self._who()} was made without an event")
        return self._event

    def clear_event(self) -> None:
        """Makes fileno() unreadable until the next frame is published; before poll()."""
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self.fileno())

    def _take(self) -> memoryview:
        if self.held >= self._at_once:
            raise RingError(f"{self._who()}: release frame {self._released + 1} first")
        words = self._words
        place = self._taken % self._spec.frames
        sequence = self._taken + 1
        header = self._headers[place]
        if words[header] != sequence:
            raise RingError(f"{self._who()}: frame {sequence} was overwritten by {words[header]}")
        words[self._line + _TAKEN] = self._taken = sequence
        return self._frames[place][: words[header + 1]]

    def _who(self) -> str:
        return f"ring {self._spec.name}: reader {self._reader}"


def _why_full(spec: RingSpec, words: memoryview, needed: int) -> str:
    """Who has not released frame `needed`, whose place the next one takes; "" = nobody."""
    laggards = []
    for index, name in enumerate(spec.readers):
        line = _FIRST_READER + index * WORDS_PER_LINE
        released, taken, pid = words[line : line + 3]
        if released >= needed:
            continue
        state = f"{describe_process(pid)}; released {released}"
        if taken > released:
            held = "holds" if is_alive(pid) else "died while holding"
            first = f"s {released + 1} to" if taken > released + 1 else ""
            state += f", {held} frame{first} {taken}"
        laggards.append(f"{name} ({state})")
    if not laggards:
        return ""
    return (
        f"all {spec.frames} frames are in use until frame {needed} is released by "
        f"{', '.join(laggards)}"
    )


class _Layout:
    """Where the frames of a ring lie.  headers: word index of each frame's header."""

    def __init__(self, spec: RingSpec) -> None:
        self._frame_bytes = spec.frame_bytes
        first = (2 + len(spec.readers)) * CACHE_LINE
        stride = CACHE_LINE + round_up(spec.frame_bytes, CACHE_LINE)
        self.nbytes = first + spec.frames * stride
        self.headers = [(first + place * stride) // 8 for place in range(spec.frames)]

    def payloads(self, memory: Mapping) -> list[memoryview]:
        """Each frame's payload, whole."""
        starts = [header * 8 + CACHE_LINE for header in self.headers]
        return [memory.view[start : start + self._frame_bytes] for start in starts]


def _shape(spec: RingSpec) -> bytes:
    numbers = (_MAGIC, spec.frames, spec.frame_bytes, len(spec.readers))
    return b"".join(number.to_bytes(8, "little") for number in numbers)


def _attach(spec: RingSpec, fd: int) -> Mapping:
    """Maps the ring with its pages present; checks that the memory is a ring of this shape."""
    memory = map_memory(fd, populate=True)
    if memory.nbytes < 4 * 8 or memory.view[: 4 * 8] != _shape(spec):
        raise RingError(
            f"ring {spec.name}: descriptor {fd} ({memory.nbytes} bytes) holds no ring of "
            f"{spec.frames} frames of {spec.frame_bytes} bytes for {len(spec.readers)} readers"
        )
    return memory


def _claim(spec: RingSpec, words: memoryview, line: int, role: str) -> None:
    """Writes this process's pid into its line; refuses when another live process is there."""
    holder = words[line + _PID]
    if holder not in (0, os.getpid()) and is_alive(holder):
        raise RingError(f"ring {spec.name} has its {role} already: pid {holder}")
    words[line + _PID] = os.getpid()
