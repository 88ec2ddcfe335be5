"""Not to sleep while tokens come.

Who sleeps until a descriptor is readable is late by the time that a core takes to wake up:
some 50 us, now and then several times as much, which a client sees between two tokens.
"""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import zmq

from .ring import RingReader

_LOOKS = 64
"""At the ring between two polls: a look takes 0.1 us, and a poll two calls of the kernel."""


def await_news(
    poller: zmq.Poller, ring: RingReader, awake_until_s: float, timeout_ms: int | None = None
) -> dict[Any, int]:
    """What is readable, as soon as something is, or nothing after `timeout_ms` (None = never).

    The ring's event is among it, and cleared: its frames are to be taken until there is none.

    Does not sleep before awake_until_s, by time.monotonic(), and returns then, with nothing, as
    soon as the ring has a frame, which is some 20 us before its event is readable.
    """
    news: dict[Any, int] = {}
    while not news and time.monotonic() < awake_until_s:
        for _ in range(_LOOKS):
            if ring.has_frame:
                return news
        news = dict(poller.poll(0))
        if not news:
            os.sched_yield()
    news = news or dict(poller.poll(timeout_ms))
    if ring.fileno() in news:
        ring.clear_event()
    return news


class Wakefulness:
    """Of an event loop.

    for_s: so long it polls behind each stay(), instead of sleeping; 0 = never.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, for_s: float) -> None:
        self._loop = loop
        self._for_s = for_s
        self._until = 0.0
        self._awake = False

    def stay(self) -> None:
        """Something has come, and more will come soon."""
        if not self._for_s:
            return
        self._until = self._loop.time() + self._for_s
        if not self._awake:
            self._awake = True
            self._loop.call_soon(self._again)

    def rest(self) -> None:
        """Nothing will come for a while: the loop may sleep at once."""
        self._until = 0.0

    def _again(self) -> None:
        """A callback that is due at once keeps the loop from waiting."""
        self._awake = self._loop.time() < self._until
        if self._awake:
            os.sched_yield()
            self._loop.call_soon(self._again)
