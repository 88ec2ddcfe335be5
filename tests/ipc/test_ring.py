"""The ring: its rules, and how it works between real processes."""

from __future__ import annotations

import os
import platform
import re
import select
import signal
import struct
import time
from collections.abc import Callable

import msgspec
import numpy as np
import pytest

from albireo.ipc import shared_memory
from albireo.ipc.plan import plan_bytes, result_bytes
from albireo.ipc.ring import (
    RingError,
    RingReader,
    RingSpec,
    RingTimeout,
    RingWriter,
    create_ring,
)
from albireo.ipc.rings import plan_ring, result_ring

from ..specs import ENGINE

SPEC = RingSpec("g0.test", 4, 100, ("fast", "slow"))

Fork = Callable[[Callable[[], None]], int]


def write(writer: RingWriter, payload: bytes, timeout_s: float = 5.0) -> None:
    writer.reserve(timeout_s)[: len(payload)] = payload
    writer.publish(len(payload))


def read(reader: RingReader, timeout_s: float = 5.0) -> bytes:
    payload = bytes(reader.wait(timeout_s))
    reader.release()
    return payload


# ------------------------------------------------------------ shape and rules
def test_payloads_are_aligned_and_hold_int32_in_place() -> None:
    fd = create_ring(SPEC)
    writer, reader = RingWriter(SPEC, fd), RingReader(SPEC, fd, "fast")
    for k in range(SPEC.frames):
        words = np.frombuffer(writer.reserve(0), np.int32)
        assert words.ctypes.data % shared_memory.CACHE_LINE == 0
        words[:3] = (k, -k, 7)
        writer.publish(12)
        got = reader.poll()
        assert got is not None
        assert np.frombuffer(got, np.int32).tolist() == [k, -k, 7]
        with pytest.raises(TypeError):
            got[0] = 1  # other readers see the same bytes
        reader.release()


def test_publish_needs_a_reserved_frame() -> None:
    fd = create_ring(SPEC)
    writer = RingWriter(SPEC, fd)
    with pytest.raises(RingError, match="without reserve"):
        writer.publish(1)
    write(writer, b"x")
    with pytest.raises(RingError, match="without reserve"):
        writer.publish(1)


@pytest.mark.parametrize(
    "spec",
    [
        RingSpec("r", 0, 8, ("a",)),
        RingSpec("r", 1, 0, ("a",)),
        RingSpec("r", 1, 8, ()),
        RingSpec("r", 1, 8, ("a", "a")),
    ],
)
def test_a_shape_that_cannot_be_is_refused(spec: RingSpec) -> None:
    with pytest.raises(ValueError, match="ring r needs"):
        create_ring(spec)


def test_attaching_checks_the_shape_and_the_name() -> None:
    fd = create_ring(SPEC)
    with pytest.raises(RingError, match="holds no ring of 5 frames"):
        RingWriter(RingSpec("g0.test", 5, 100, SPEC.readers), fd)
    with pytest.raises(RingError, match="no reader nobody; it has fast, slow"):
        RingReader(SPEC, fd, "nobody")
    plain = shared_memory.create("plain", 16)
    with pytest.raises(RingError, match="16 bytes"):
        RingReader(SPEC, plain, "fast")


def test_the_memory_cannot_be_resized() -> None:
    fd = create_ring(SPEC)
    with pytest.raises(PermissionError):
        os.ftruncate(fd, 0)


def test_another_memory_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(shared_memory.UnsupportedMachine, match="aarch64"):
        create_ring(SPEC)


def test_a_reader_without_event_has_no_descriptor() -> None:
    reader = RingReader(SPEC, create_ring(SPEC), "fast")
    with pytest.raises(RingError, match="without an event"):
        reader.fileno()


@pytest.mark.parametrize(("lookahead", "frames"), [(0, 2), (2, 6)])
def test_the_rings_of_a_group(lookahead: int, frames: int) -> None:
    engine = msgspec.structs.replace(
        ENGINE, tp=3, max_model_len=512, max_num_batched_tokens=128, lookahead=lookahead
    )
    plan = plan_ring(2, engine)
    assert plan.name == "g2.plan"
    assert plan.readers == ("worker0", "worker1", "worker2")
    assert plan.frames == frames
    assert plan.frame_bytes == plan_bytes(8, 128, 16, 512)
    result = result_ring(2, engine)
    assert result == RingSpec("g2.result", frames, result_bytes(8), ("scheduler", "detokenizer"))


# ------------------------------------------------------------ between processes
@pytest.mark.parametrize("spin_us", [0, 200])
def test_messages_cross_processes_in_order(fork: Fork, spin_us: int) -> None:
    """The writer laps the ring often and both sides sleep in turn."""
    fd = create_ring(SPEC)
    count = 3000

    def read_all(name: str, pause_every: int) -> None:
        reader = RingReader(SPEC, fd, name, spin_us=spin_us)
        for k in range(count):
            assert struct.unpack("<q", read(reader)) == (k,)
            if k % pause_every == 0:
                time.sleep(0.001)

    pids = [fork(lambda: read_all("fast", 10_000)), fork(lambda: read_all("slow", 100))]
    writer = RingWriter(SPEC, fd, spin_us=spin_us)
    for k in range(count):
        write(writer, struct.pack("<q", k))
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0, 0]


def test_a_sleeping_reader_is_woken(fork: Fork) -> None:
    """It sleeps in the kernel (no CPU time passes) and wakes long before its deadline."""
    ask, answer = (RingSpec(name, 2, 8, ("only",)) for name in ("ask", "answer"))
    ask_fd, answer_fd = create_ring(ask), create_ring(answer)

    def reply() -> None:
        reader, writer = RingReader(ask, ask_fd, "only"), RingWriter(answer, answer_fd)
        cpu_s = time.process_time()
        payload = read(reader, 20)
        assert time.process_time() - cpu_s < 0.1
        write(writer, payload)

    pid = fork(reply)
    writer, reader = RingWriter(ask, ask_fd), RingReader(answer, answer_fd, "only")
    time.sleep(0.3)
    start = time.monotonic()
    write(writer, b"now")
    assert read(reader, 20) == b"now"
    assert time.monotonic() - start < 5
    assert os.waitpid(pid, 0)[1] == 0


def test_a_sleeping_writer_is_woken(fork: Fork) -> None:
    spec = RingSpec("g0.test", 1, 8, ("only",))
    fd = create_ring(spec)

    def read_late() -> None:
        reader = RingReader(spec, fd, "only")
        reader.wait(20)
        time.sleep(0.2)
        reader.release()
        assert read(reader, 20) == b"two"

    pid = fork(read_late)
    writer = RingWriter(spec, fd)
    write(writer, b"one")
    start = time.monotonic()
    write(writer, b"two", timeout_s=20)
    assert time.monotonic() - start < 5
    assert os.waitpid(pid, 0)[1] == 0


def test_a_slow_reader_is_named_with_its_frame_and_pid(fork: Fork) -> None:
    fd = create_ring(SPEC)
    started, go = os.pipe(), os.pipe()

    def hold_the_second() -> None:
        reader = RingReader(SPEC, fd, "slow")
        read(reader)
        reader.wait(5)
        os.write(started[1], b".")
        os.read(go[0], 1)

    pid = fork(hold_the_second)
    writer, fast = RingWriter(SPEC, fd), RingReader(SPEC, fd, "fast")
    for k in range(5):
        write(writer, bytes([k]))
        assert read(fast) == bytes([k])
    os.read(started[0], 1)
    with pytest.raises(RingTimeout) as caught:
        writer.reserve(0.05)
    text = str(caught.value)
    assert re.match(r"ring g0\.test: writer waited 0\.\d+ s to write frame 6;", text)
    assert f"slow (pid {pid}; released 1, holds frame 2)" in text
    assert "fast" not in text
    os.write(go[1], b".")


def test_a_reader_killed_while_holding_a_frame_is_named_as_dead(fork: Fork) -> None:
    fd = create_ring(SPEC)
    started = os.pipe()

    def hold() -> None:
        RingReader(SPEC, fd, "slow").wait(5)
        os.write(started[1], b".")
        signal.pause()

    pid = fork(hold)
    writer, fast = RingWriter(SPEC, fd), RingReader(SPEC, fd, "fast")
    for _ in range(4):
        write(writer, b"x")
        read(fast)
    os.read(started[0], 1)
    os.kill(pid, signal.SIGKILL)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # dead, but still a zombie
    expected = rf"slow \(pid {pid}, dead; released 0, died while holding frame 1\)"
    with pytest.raises(RingTimeout, match=expected):
        writer.reserve(0.02)
    os.waitpid(pid, 0)
    with pytest.raises(RingTimeout, match=expected):
        writer.reserve(0)
    # Only the dead are replaced; the newcomer goes on where the dead one stopped.
    slow = RingReader(SPEC, fd, "slow")
    with pytest.raises(RingTimeout, match=rf"slow \(pid {os.getpid()}; released 0\)"):
        writer.reserve(0)
    assert [read(slow, 0) for _ in range(4)] == [b"x"] * 4


def test_a_reader_that_never_came_is_named() -> None:
    fd = create_ring(SPEC)
    writer, fast = RingWriter(SPEC, fd), RingReader(SPEC, fd, "fast")
    for _ in range(4):
        write(writer, b"x")
        read(fast)
    with pytest.raises(RingTimeout, match=r"slow \(never attached; released 0\)"):
        writer.reserve(0)


def test_a_dead_writer_is_named(fork: Fork) -> None:
    fd = create_ring(SPEC)
    pid = fork(lambda: write(RingWriter(SPEC, fd), b"last"))
    os.waitpid(pid, 0)
    reader = RingReader(SPEC, fd, "fast")
    assert read(reader) == b"last"
    with pytest.raises(RingTimeout) as caught:
        reader.wait(0.02)
    assert re.fullmatch(
        rf"ring g0.test: reader fast \(pid {os.getpid()}\) waited \d+\.\d+ s for frame 2; "
        rf"the writer \(pid {pid}, dead\) has published 1",
        str(caught.value),
    )


def test_a_place_taken_by_a_live_process_is_refused(fork: Fork) -> None:
    fd = create_ring(SPEC)
    started = os.pipe()

    def stay() -> None:
        roles = RingWriter(SPEC, fd), RingReader(SPEC, fd, "fast")
        os.write(started[1], b".")
        signal.pause()
        del roles

    pid = fork(stay)
    os.read(started[0], 1)
    with pytest.raises(RingError, match=f"has its writer already: pid {pid}"):
        RingWriter(SPEC, fd)
    with pytest.raises(RingError, match=f"has its reader fast already: pid {pid}"):
        RingReader(SPEC, fd, "fast")
    RingReader(SPEC, fd, "slow")


def test_the_event_is_readable_while_frames_are_new(fork: Fork) -> None:
    fd = create_ring(SPEC)
    event = os.eventfd(0)
    go = os.pipe()

    def write_three() -> None:
        writer = RingWriter(SPEC, fd, events=[event])
        for payload in (b"1", b"2", b"3"):
            os.read(go[0], 1)
            write(writer, payload)

    pid = fork(write_three)
    reader = RingReader(SPEC, fd, "fast", event=event)
    assert reader.fileno() == event

    def readable(timeout_s: float) -> bool:
        return bool(select.select([reader], [], [], timeout_s)[0])

    reader.clear_event()  # nothing to clear: does not block
    assert not readable(0)
    os.write(go[1], b".")
    assert readable(10)
    reader.clear_event()
    assert not readable(0)
    assert read(reader, 0) == b"1"
    os.write(go[1], b"..")
    assert os.waitpid(pid, 0)[1] == 0
    assert readable(0)
    reader.clear_event()  # one clearing for two frames: poll until None
    assert [read(reader, 0), read(reader, 0)] == [b"2", b"3"]
    assert reader.poll() is None
    assert not readable(0)
