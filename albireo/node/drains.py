"""What the supervisor asks the router to let finish: one group's requests, or all of them."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from albireo.ipc.messages import Drain, Drained

_GRACE_S = 1.0
"""For the router's answer, which comes at the latest when the time is over."""


@dataclass
class _Asked:
    group: int
    until: float
    """By time.monotonic()."""
    answered: asyncio.Event = field(default_factory=asyncio.Event)


class Drains:
    """Those that are under way, by numbers of their own: a late answer ends no later drain.

    send: hands a Drain to the router.
    """

    def __init__(self, send: Callable[[Drain], object]) -> None:
        self._send = send
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Asked] = {}

    async def finished(self, timeout_s: float, group: int = -1) -> None:
        """Returns when the router says that nobody is served any more, or the time is over.

        group: -1 = all of the node's, which takes no new requests from now on.
        """
        number = next(self._numbers)
        asked = self._asked[number] = _Asked(group, time.monotonic() + timeout_s)
        self._send(Drain(timeout_s, group, number))
        try:
            await asyncio.wait_for(asked.answered.wait(), timeout_s + _GRACE_S)
        except TimeoutError:
            pass
        finally:
            del self._asked[number]

    def answered(self, message: Drained) -> None:
        """The router's answer has come."""
        asked = self._asked.get(message.number)
        if asked is not None:
            asked.answered.set()

    def ask_again(self) -> None:
        """Of a router that has started again and knows nothing of them."""
        now = time.monotonic()
        for number, asked in self._asked.items():
            self._send(Drain(max(0.0, asked.until - now), asked.group, number))
