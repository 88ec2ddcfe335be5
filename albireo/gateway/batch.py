"""The requests to the node behind one HTTP request: one for each prompt."""

from __future__ import annotations

import functools
from collections import deque

from albireo.client import AlbireoError

from .inbox import Inbox, Whole
from .link import Abandon, Ask, NodeLink

_TRIES = 2
"""Prompts asked again as one ends: one has its place, another finds what room others have left."""


class Batch:
    """Asks the node all prompts; what it has no room for beside the others waits for them.

    A prompt that is refused for lack of room is held back while others of its batch are in
    flight, and asked again as those end.  Without any, the refusal is the answer.
    """

    def __init__(self, link: NodeLink, asks: list[Ask], inbox: Inbox, stream: bool) -> None:
        self._link = link
        self._asks = asks
        self._inbox = inbox
        self._stream = stream
        self._n = asks[0].params.n
        self._running: dict[int, Abandon] = {}
        self._held: deque[int] = deque()

    def start(self) -> None:
        """Raises AlbireoError."""
        self._inbox.batch = self
        for prompt in range(len(self._asks)):
            self._submit(prompt)

    def end(self) -> None:
        """Cancels what has not ended."""
        self._inbox.batch = None
        for abandon in self._running.values():
            abandon()

    def hold(self, prompt: int) -> bool:
        """Whether a prompt that has just been refused can wait for another one's end."""
        if (len(self._held) + 1) * self._n >= self._inbox.open:
            return False
        self._held.append(prompt)
        return True

    def choice_ended(self) -> None:
        """Asks again once as many have ended as a prompt has."""
        if not self._held or self._inbox.open % self._n or self._inbox.error is not None:
            return
        for _ in range(min(_TRIES, len(self._held))):
            prompt = self._held.popleft()
            try:
                self._submit(prompt)
            except AlbireoError as error:
                self._inbox.put(prompt, error)

    def _submit(self, prompt: int) -> None:
        inbox = self._inbox
        put = functools.partial(inbox.put, prompt) if self._stream else Whole(inbox, prompt)
        self._running[prompt] = self._link.submit(self._asks[prompt], put)
