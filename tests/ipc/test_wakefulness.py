"""Polls instead of sleeping for a while, and no longer."""

from __future__ import annotations

import asyncio
import os
import time

import uvloop
import zmq

from albireo.ipc.ring import RingReader, RingSpec, RingWriter, create_ring
from albireo.ipc.wakefulness import Wakefulness, await_news


async def _cpu_share(wakefulness: Wakefulness | None, seconds: float) -> float:
    """Of a core, that this process takes in so many seconds of which stay() is told first."""
    if wakefulness is not None:
        wakefulness.stay()
    began, used = time.monotonic(), time.process_time()
    await asyncio.sleep(seconds)
    return (time.process_time() - used) / (time.monotonic() - began)


def test_it_polls_while_it_is_to_stay_awake() -> None:
    async def shares() -> tuple[float, float, float]:
        loop = asyncio.get_running_loop()
        awake, never = Wakefulness(loop, 0.1), Wakefulness(loop, 0.0)
        return (
            await _cpu_share(awake, 0.1),
            await _cpu_share(None, 0.2),  # the time is over
            await _cpu_share(never, 0.2),
        )

    polled, afterwards, never = uvloop.run(shares())
    # Others may have had the core, so that this says little but that it asked for it.
    assert polled > 3 * max(afterwards, never)
    assert afterwards < 0.1 and never < 0.1


class _Loop:
    """Plays an event loop of a callback a millisecond."""

    now, due = 0.0, 0

    def time(self) -> float:
        return self.now

    def call_soon(self, callback: object) -> None:
        self.due += 1


def test_each_word_of_it_counts_from_its_own_time() -> None:
    loop, turns = _Loop(), 0
    awake = Wakefulness(loop, 0.0105)  # type: ignore[arg-type]
    awake.stay()
    while loop.due:
        loop.due -= 1
        loop.now += 0.001
        if turns == 4:
            awake.stay()
        awake._again()
        turns += 1
    assert turns == 16  # five, of which the last heard it, and eleven
    awake.stay()
    assert loop.due == 1


def test_it_may_be_told_to_rest() -> None:
    loop = _Loop()
    awake = Wakefulness(loop, float("inf"))  # type: ignore[arg-type]
    awake.stay()
    for _ in range(3):
        loop.due -= 1
        awake._again()
        assert loop.due == 1
    awake.rest()
    loop.due -= 1
    awake._again()
    assert loop.due == 0
    awake.stay()
    assert loop.due == 1


def test_a_frame_is_seen_before_its_event_is_readable() -> None:
    """While awake; who sleeps is woken by the event."""
    spec = RingSpec(name="results", frames=2, frame_bytes=64, readers=("scheduler",))
    memory, event = create_ring(spec), os.eventfd(0, os.EFD_NONBLOCK)
    unheard = RingWriter(spec, memory)
    reader = RingReader(spec, memory, "scheduler", event=event)
    poller = zmq.Poller()
    poller.register(reader, zmq.POLLIN)
    assert not reader.has_frame
    assert await_news(poller, reader, time.monotonic() + 0.01, 0) == {}
    unheard.reserve(1.0)
    unheard.publish(8)
    assert reader.has_frame
    began = time.monotonic()
    assert await_news(poller, reader, began + 60.0) == {}
    assert time.monotonic() - began < 30
    assert await_news(poller, reader, 0.0, 0) == {}, "nobody has written its event"
    assert reader.poll() is not None
    reader.release()
    assert not reader.has_frame
    writer = RingWriter(spec, memory, [event])
    writer.reserve(1.0)
    writer.publish(8)
    assert await_news(poller, reader, 0.0) == {event: zmq.POLLIN}
    assert await_news(poller, reader, 0.0, 0) == {}, "its event is cleared"
    other = os.eventfd(1, os.EFD_NONBLOCK)
    poller.register(other, zmq.POLLIN)
    assert reader.poll() is not None
    began = time.monotonic()
    assert await_news(poller, reader, began + 60.0) == {other: zmq.POLLIN}, "a ring is not all"
    assert time.monotonic() - began < 30
    for fd in (memory, event, other):
        os.close(fd)
