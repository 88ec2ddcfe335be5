"""Waiting awake for a counter, without the interpreter's lock."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from albireo.ipc.ring import RingReader, RingSpec, RingTimeout, RingWriter, create_ring
from albireo.ipc.shared_memory import Mapping, create, map_memory
from albireo.workers.kernels.cpu.spin import spin_until


@pytest.fixture
def memory() -> Iterator[Mapping]:
    fd = create("counter", 4096)
    yield map_memory(fd)
    os.close(fd)


def test_it_returns_when_the_counter_is_there_or_the_time_is_over(memory: Mapping) -> None:
    memory.words[5] = 7
    began = time.monotonic()
    spin_until(memory.address + 40, 7, began + 60)
    assert time.monotonic() - began < 10
    spin_until(memory.address + 40, 8, time.monotonic() + 0.02)
    assert time.monotonic() - began >= 0.02


def test_another_thread_works_meanwhile_and_is_seen(memory: Mapping) -> None:
    """With a switch interval of a minute it would never get a turn from one that keeps the lock."""

    def count() -> None:
        time.sleep(0.01)
        memory.words[0] = 1

    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        thread = threading.Thread(target=count)
        thread.start()
        assert memory.wait_until(0, 1, time.monotonic() + 50, time.monotonic() + 60, spin_until)
        thread.join()
    finally:
        sys.setswitchinterval(interval)


def test_a_ring_is_read_with_it() -> None:
    spec = RingSpec(name="plans", frames=2, frame_bytes=64, readers=("worker0",))
    fd = create_ring(spec)
    writer = RingWriter(spec, fd)
    reader = RingReader(spec, fd, "worker0", spin_us=20_000, spin=spin_until)
    with pytest.raises(RingTimeout):
        reader.wait(0.03)
    began = time.process_time()
    with pytest.raises(RingTimeout):
        reader.wait(0.2, spins=False)
    assert time.process_time() - began < 0.1, "it sleeps"
    timer = threading.Timer(0.005, lambda: writer.publish(len(writer.reserve(1.0))))
    timer.start()
    assert len(reader.wait(10.0)) == 64
    timer.join()


def test_who_may_not_spin_does_not(memory: Mapping) -> None:
    """A round of it takes a core for a millisecond, of which there are few where none may spin."""
    now = time.monotonic()

    def spin(address: int, target: int, end_s: float) -> None:
        raise AssertionError("it spins")

    assert not memory.wait_until(0, 1, now, now + 0.02, spin)
