"""A batch of requests through one client: sent as the node has room for them.

    waiting ──send──▶ in flight ──answer, error──▶ results, in the order of the requests
       ▲                  │
       └── queue full: the request goes again, first in line

What is in flight stays below `room`.  Where the node has less than that (a group
restarts, other clients ask it too) it refuses, and the limit goes down to what
it took, and up again by one with each answer.
"""

from __future__ import annotations

import functools
import queue
import time
from collections import deque
from collections.abc import Callable, Sequence

import msgspec

from albireo.client import AlbireoError, Client, Completion, ConnectionLost, QueueFull
from albireo.client.results import Collector

_AGAIN_S = 0.05
"""After which a refused request is sent again when nothing of this batch is in flight."""

Result = Completion | AlbireoError


class Request(msgspec.Struct, frozen=True):
    """make: the message for an id of the connection.  answers: n of its parameters."""

    make: Callable[[int], msgspec.Struct]
    answers: int


class Batch:
    """The requests of one call; see run()."""

    def __init__(
        self,
        requests: Sequence[Request],
        room: int,
        connect: Callable[[], Client],
        on_end: Callable[[Result], None],
    ) -> None:
        """
        room: answers that the node takes at once.
        connect: gives the client, or raises why there is none any more.
        on_end: gets each result as it comes.
        """
        self._requests = requests
        self._room = self._limit = room
        self._connect = connect
        self._on_end = on_end
        self._waiting = deque(range(len(requests)))
        self._in_flight: dict[int, tuple[Client, int]] = {}
        self._answers = 0
        self._ended: queue.SimpleQueue[tuple[int, Result]] = queue.SimpleQueue()
        self._results: dict[int, Result] = {}

    def run(self, *, return_errors: bool) -> list[Result]:
        """Waits for all answers; leaving early, by an error too, cancels what is in flight.

        Raises the first AlbireoError, with a note that names the prompt, unless
        `return_errors` has errors take the places of their answers.
        """
        try:
            while len(self._results) < len(self._requests):
                self._send()
                self._take(return_errors)
        finally:
            for client, request_id in self._in_flight.values():
                client.abandon(request_id)
        return [self._results[index] for index in range(len(self._requests))]

    def _send(self) -> None:
        """As many as there is room for, and one where nothing is in flight."""
        client = self._connect()
        while self._waiting:
            index = self._waiting[0]
            request = self._requests[index]
            if self._answers and self._answers + request.answers > self._limit:
                return
            self._waiting.popleft()
            done = functools.partial(self._done, index)
            try:
                request_id = client.request(request.make, Collector(request.answers, done))
            except AlbireoError as error:
                self._ended.put((index, error))
                request_id = -1
            self._in_flight[index] = (client, request_id)
            self._answers += request.answers

    def _done(self, index: int, result: Result) -> None:
        """On the client's reader thread."""
        self._ended.put((index, result))

    def _take(self, return_errors: bool) -> None:
        """Waits for the next answer or error: a result, or worth another try."""
        index, result = self._ended.get()
        del self._in_flight[index]
        self._answers -= self._requests[index].answers
        if isinstance(result, QueueFull):
            self._limit = max(self._answers, 1)
            self._waiting.appendleft(index)
            if not self._in_flight:
                time.sleep(_AGAIN_S)
            return
        if isinstance(result, ConnectionLost):
            self._connect()  # Raises, where the reason is that all is over.
        self._limit = min(self._room, self._limit + 1)
        if isinstance(result, AlbireoError) and not return_errors:
            result.add_note(f"This is about prompt {index}, of 0 to {len(self._requests) - 1}.")
            raise result
        self._results[index] = result
        self._on_end(result)
