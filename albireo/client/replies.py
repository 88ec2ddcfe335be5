"""From bytes of the connection to the handlers of the requests they answer.

Used by both clients: by the asyncio one on its loop, by the blocking one on
its reader thread.  A request's handler is called with each of its Deltas, or
with its one answer, or with an AlbireoError; after the last word (the ends of
all n answers) it is gone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import msgspec

from albireo.ipc.framing import FrameSplitter, FrameTooLarge
from albireo.ipc.protocol import (
    Delta,
    Deltas,
    Error,
    ModelList,
    NodeStatus,
    RouterMessage,
    Text,
    Tokens,
    Welcome,
)

from .errors import AlbireoError, ConnectionLost, InternalError, exception_of

Answer = Tokens | Text | ModelList | NodeStatus
Reply = Delta | Answer | AlbireoError
Handler = Callable[[Reply], None]

_LAST_CODES = frozenset({"protocol", "too_large", "unauthenticated", "unavailable"})
"""Codes of an Error without an id, after which the node closes the connection."""

_decode = msgspec.msgpack.Decoder(RouterMessage).decode


class Replies:
    """Handlers of the requests in flight on one connection.

    lost: why the connection is over; None while it is not.
    welcome: the node's answer to hello, once it has come.

    feed() and lose() belong to one thread; the rest may be called by any.
    """

    def __init__(self) -> None:
        self.lost: AlbireoError | None = None
        self.welcome: Welcome | None = None
        self._ids = itertools.count(1)
        self._handlers: dict[int, Handler] = {}
        self._more_ends: dict[int, int] = {}
        """Of requests for several answers: how many ends are still to come but one."""
        self._splitter = FrameSplitter()
        self._complaint: Error | None = None

    def expect(self, handler: Handler) -> int:
        """A new id, whose replies go to `handler`.  Raises what ended the connection."""
        request_id = next(self._ids)
        self._handlers[request_id] = handler
        if self.lost is not None:
            self._handlers.pop(request_id, None)
            raise self.lost
        return request_id

    def expect_ends(self, request_id: int, n: int) -> None:
        """The request is for n answers; said before it is sent."""
        if n > 1:
            self._more_ends[request_id] = n - 1

    def forget(self, request_id: int) -> bool:
        """Drops further replies; False when the last has come already."""
        self._more_ends.pop(request_id, None)
        return self._handlers.pop(request_id, None) is not None

    def expects(self, request_id: int) -> bool:
        """Whether the last reply to a request is still to come."""
        return request_id in self._handlers

    def feed(self, data: bytes) -> None:
        """Takes bytes as they come.  Raises ConnectionLost when they are no frames."""
        handlers = self._handlers
        try:
            for payload in self._splitter.feed(data):
                message = _decode(payload)
                if type(message) is Deltas:
                    for item in message.items:
                        handler = handlers.get(item.id)
                        if handler is not None:
                            if item.end is not None and self._is_last_end(item.id):
                                handlers.pop(item.id, None)
                            handler(item)
                else:
                    self._other(message)
        except (msgspec.MsgspecError, UnicodeDecodeError, FrameTooLarge) as error:
            raise ConnectionLost(f"the node sent what is not of the protocol: {error}") from None

    def lose(self, error: AlbireoError | None = None) -> None:
        """The connection is over: every request in flight gets an error."""
        if self.lost is None:
            if self._complaint is not None:
                error = exception_of(self._complaint)
            self.lost = error or ConnectionLost("the node closed the connection", retry=True)
        while self._handlers:
            try:
                _, handler = self._handlers.popitem()
            except KeyError:
                return
            handler(self.lost)

    def _is_last_end(self, request_id: int) -> bool:
        more = self._more_ends.pop(request_id, 0)
        if more > 1:
            self._more_ends[request_id] = more - 1
        return more == 0

    def _other(self, message: object) -> None:
        if isinstance(message, Error):
            if message.id is None:
                # Where it does not end the connection, it is about no request of ours.
                self._complaint = message if message.code in _LAST_CODES else None
                return
            self._more_ends.pop(message.id, None)
            handler = self._handlers.pop(message.id, None)
            if handler is not None:
                handler(exception_of(message))
        elif isinstance(message, Tokens | Text | ModelList | NodeStatus):
            handler = self._handlers.pop(message.id, None)
            if handler is not None:
                handler(message)
        elif isinstance(message, Welcome):
            self.welcome = message


def as_error(reply: Reply) -> AlbireoError:
    """The error to raise for a reply that is not the one that was waited for."""
    if isinstance(reply, AlbireoError):
        return reply
    return InternalError(f"the node answered with an unexpected {type(reply).__name__}")
