"""The ring against a model: a deque for each reader."""

from __future__ import annotations

import os
import re
from collections import deque

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from albireo.ipc import shared_memory
from albireo.ipc.ring import (
    FrameTooLarge,
    RingError,
    RingReader,
    RingSpec,
    RingTimeout,
    RingWriter,
    create_ring,
)

FRAME_BYTES = 100
NAMES = ("fast", "slow", "third")


def set_sequence(fd: int, sequence: int, readers: int) -> None:
    """Makes an empty ring one that has carried `sequence` frames."""
    words = shared_memory.map_memory(fd).words
    for line in range(1, 2 + readers):
        words[line * shared_memory.WORDS_PER_LINE] = sequence


class RingMachine(RuleBasedStateMachine):
    """Readers of any speed see every message once, in order, unharmed while they hold it."""

    @initialize(
        frames=st.integers(1, 5),
        readers=st.integers(1, 3),
        sequence=st.sampled_from([0, 2**31 - 2, 2**32 - 2, 2**63 - 2]),
        at_once=st.integers(1, 3),
    )
    def start(self, frames: int, readers: int, sequence: int, at_once: int) -> None:
        self.spec = RingSpec("g0.model", frames, FRAME_BYTES, NAMES[:readers])
        fd = create_ring(self.spec)
        set_sequence(fd, sequence, readers)
        self.writer = RingWriter(self.spec, fd)
        self.at_once = at_once
        self.readers = {
            name: RingReader(self.spec, fd, name, at_once=at_once) for name in self.spec.readers
        }
        os.close(fd)
        self.unread: dict[str, deque[bytes]] = {name: deque() for name in self.spec.readers}
        self.held: dict[str, deque[tuple[memoryview, bytes]]] = {
            name: deque() for name in self.spec.readers
        }

    def in_use(self, name: str) -> int:
        """Frames that this reader keeps the writer from using."""
        return len(self.unread[name]) + len(self.held[name])

    def full(self) -> list[str]:
        return [name for name in self.spec.readers if self.in_use(name) == self.spec.frames]

    @rule(payload=st.binary(max_size=FRAME_BYTES))
    def write(self, payload: bytes) -> None:
        laggards = self.full()
        if laggards:
            with pytest.raises(RingTimeout) as caught:
                self.writer.reserve(0)
            named = re.findall(r"(\w+) \(pid", str(caught.value))
            assert named == laggards
            return
        frame = self.writer.reserve(0)
        assert len(frame) == FRAME_BYTES
        frame[: len(payload)] = payload
        self.writer.publish(len(payload))
        for unread in self.unread.values():
            unread.append(payload)

    @precondition(lambda self: not self.full())
    @rule(excess=st.integers(1, 1000), payload=st.binary(min_size=1, max_size=FRAME_BYTES))
    def write_too_much(self, excess: int, payload: bytes) -> None:
        """Nothing of it is seen, and the reserved frame is still there for a smaller message."""
        frame = self.writer.reserve(0)
        with pytest.raises(ValueError):
            frame[:] = bytes(FRAME_BYTES + excess)
        with pytest.raises(FrameTooLarge, match=f"{FRAME_BYTES + excess} bytes"):
            self.writer.publish(FRAME_BYTES + excess)
        self.write(payload)

    @rule(name=st.sampled_from(NAMES))
    def take(self, name: str) -> None:
        if name not in self.readers:
            return
        if self.unread[name] and len(self.held[name]) == self.at_once:
            with pytest.raises(RingError, match="release frame"):
                self.readers[name].poll()
            return
        frame = self.readers[name].poll()
        if not self.unread[name]:
            assert frame is None
            with pytest.raises(RingTimeout, match=f"reader {name} "):
                self.readers[name].wait(0)
            return
        assert frame is not None
        self.held[name].append((frame, self.unread[name].popleft()))

    @rule(name=st.sampled_from(NAMES))
    def release(self, name: str) -> None:
        if name not in self.readers:
            return
        if not self.held[name]:
            with pytest.raises(RingError, match="without a frame"):
                self.readers[name].release()
            return
        self.held[name].popleft()
        self.readers[name].release()
        assert self.readers[name].held == len(self.held[name])

    @invariant()
    def held_frames_are_untouched(self) -> None:
        for held in getattr(self, "held", {}).values():
            assert all(frame == payload for frame, payload in held)


TestRingMachine = RingMachine.TestCase
TestRingMachine.settings = settings(
    max_examples=150,
    stateful_step_count=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
