"""Requests in flight, over however many connections they take.

Used by both clients: by the asyncio one on its loop, by the blocking one on
its reader thread.  A request's handler is called with each of its Deltas, or
with its one answer, or with an AlbireoError; after the last word (the ends of
all n answers) it is gone.

When a connection breaks a request has one of four fates.  Nothing had come of it:
it is asked again.  The node keeps requests (Welcome.resume_s): it goes on behind
what has come (Resume).  Its handler can start from the beginning (`restart`): it
is asked again.  Else it ends with ConnectionLost.
"""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable

import msgspec

from albireo.ipc.framing import FrameSplitter, FrameTooLarge
from albireo.ipc.protocol import (
    Cancel,
    Delta,
    Deltas,
    Error,
    Have,
    ModelList,
    NodeStatus,
    Resume,
    RouterMessage,
    Text,
    Tokens,
    Welcome,
)

from .errors import AlbireoError, ConnectionLost, InternalError, exception_of
from .requests import answers_of, frame

Answer = Tokens | Text | ModelList | NodeStatus
Reply = Delta | Answer | AlbireoError
Handler = Callable[[Reply], None]

MAX_LOSSES = 4
"""Connections that a request may lose in a row without getting any further: it may be the cause."""

_LAST_CODES = frozenset({"protocol", "too_large", "unauthenticated", "unavailable"})
"""Codes of an Error without an id, after which the node closes the connection."""

_decode = msgspec.msgpack.Decoder(RouterMessage).decode


class Pending:
    """A request in flight.

    frame: what asks it; empty when that cannot be done again.
    tokens: that have come, of each answer that has not ended.  scored: prompt logprobs.
    untouched: nothing has come of it.
    restart: brings the handler back to where nothing has come; None where that cannot be.
    cancelled: an early end was asked for.
    """

    __slots__ = (
        "answers",
        "cancelled",
        "frame",
        "handler",
        "losses",
        "progress",
        "restart",
        "scored",
        "tokens",
        "untouched",
    )

    def __init__(self, message: msgspec.Struct, handler: Handler, encoded: bytes) -> None:
        self.handler = handler
        self.frame = encoded
        self.answers = answers_of(message)
        self.tokens = dict.fromkeys(range(self.answers), 0)
        self.scored = 0
        self.untouched = True
        self.restart: Callable[[], None] | None = getattr(handler, "restart", None)
        self.cancelled = False
        self.losses = 0
        self.progress = (len(self.tokens), 0)

    def lose(self) -> int:
        """A connection has broken under it; returns how many have since it last got further."""
        progress = (len(self.tokens), sum(self.tokens.values()) + self.scored)
        self.losses = self.losses + 1 if progress == self.progress else 1
        self.progress = progress
        return self.losses

    def take(self, item: Delta) -> bool:
        """Counts what has come; True when it is the last.  Raises InternalError at a gap."""
        tokens = self.tokens
        choice, index = item.choice, item.index
        if tokens.get(choice) != index:
            raise InternalError(
                f"tokens came from index {index} of answer {choice}, where {tokens.get(choice)} "
                "had come: the answer would have a gap or a repeat",
                retry=True,
            )
        if self.untouched:
            self.untouched = False
            if self.restart is None:
                self.frame = b""
        if item.prompt_logprobs is not None:
            self.scored += len(item.prompt_logprobs)
        if item.end is None:
            tokens[choice] = index + len(item.token_ids)
            return False
        del tokens[choice]
        return not tokens

    def start_again(self) -> bool:
        """Forgets what has come; False when its handler cannot."""
        if self.restart is None:
            return False
        self.restart()
        self.tokens = dict.fromkeys(range(self.answers), 0)
        self.scored = 0
        self.untouched = True
        return True


class Replies:
    """All requests in flight of one client.

    session: the client's secret, by which a node knows it again.
    closed: why nothing can be asked any more; None while it can.

    What `Incoming` calls belongs to one thread; the rest may be called by any.
    """

    def __init__(self) -> None:
        self.session = secrets.token_urlsafe(24)
        self.closed: AlbireoError | None = None
        self._ids = itertools.count(1)
        self._requests: dict[int, Pending] = {}

    def __len__(self) -> int:
        return len(self._requests)

    # ------------------------------------------------------------------ asking
    def prepare(
        self, make: Callable[[int], msgspec.Struct], handler: Handler, max_frame_bytes: int
    ) -> tuple[int, Pending]:
        """A request with an id of its own, which is not in flight yet."""
        if self.closed is not None:
            raise self.closed.copy()
        request_id = next(self._ids)
        message = make(request_id)
        return request_id, Pending(message, handler, frame(message, max_frame_bytes))

    def begin(self, request_id: int, pending: Pending) -> None:
        """Replies are expected from now on.  Raises what has closed the client."""
        self._requests[request_id] = pending
        if self.closed is not None:
            self._requests.pop(request_id, None)
            raise self.closed.copy()

    def forget(self, request_id: int) -> bool:
        """Drops further replies; False when the last has come already."""
        return self._requests.pop(request_id, None) is not None

    def expects(self, request_id: int) -> bool:
        """Whether the last reply to a request is still to come."""
        return request_id in self._requests

    def cancel(self, request_id: int) -> bytes | None:
        """The frame that asks for a request's early end; None when it has ended."""
        pending = self._requests.get(request_id)
        if pending is None:
            return None
        pending.cancelled = True
        return frame(Cancel(id=request_id))

    # ------------------------------------------------------------------ connections
    def break_off(self, resumable: bool) -> None:
        """A connection is over, and another one is looked for: ends what cannot go on there.

        resumable: the node keeps requests.
        """
        for request_id, pending in list(self._requests.items()):
            lost = pending.lose() >= MAX_LOSSES
            why = "the connection to the node broke"
            if lost:
                why = f"{MAX_LOSSES} connections to the node broke under this request"
            elif not pending.untouched and not resumable:
                lost = not pending.start_again()
                why += ", and it keeps no requests (it has no --journal): ask again"
            if lost and self._requests.pop(request_id, None) is not None:
                pending.handler(ConnectionLost(why, retry=True))

    def again(self) -> list[bytes]:
        """What a new connection has to be told first, so that everything goes on."""
        frames = []
        for request_id, pending in list(self._requests.items()):
            if pending.untouched:
                frames.append(pending.frame)
            else:
                have = [
                    Have(choice, tokens, 0 if choice else pending.scored)
                    for choice, tokens in list(pending.tokens.items())
                ]
                frames.append(frame(Resume(id=request_id, have=have)))
            if pending.cancelled:
                frames.append(frame(Cancel(id=request_id)))
        return frames

    def lose(self, error: AlbireoError) -> None:
        """Every request in flight ends with an error, each with one of its own.

        What a handler asks then is a new request, which does not.
        """
        for request_id, pending in list(self._requests.items()):
            if self._requests.pop(request_id, None) is not None:
                pending.handler(error.copy())

    def close(self, error: AlbireoError) -> bytes:
        """The same, and nothing can be asked any more.

        Returns the frames that cancel them all: a node that keeps requests would keep these, and
        their places, for this client.
        """
        self.closed = self.closed or error
        cancels = b"".join(frame(Cancel(id=request_id)) for request_id in list(self._requests))
        self.lose(self.closed)
        return cancels

    # ------------------------------------------------------------------ what Incoming has
    def take(self, items: list[Delta], send: Callable[[bytes], None]) -> None:
        requests = self._requests
        for item in items:
            pending = requests.get(item.id)
            if pending is None:
                continue
            try:
                if pending.take(item):
                    requests.pop(item.id, None)
            except InternalError as error:
                requests.pop(item.id, None)
                send(frame(Cancel(id=item.id)))
                pending.handler(error)
            else:
                pending.handler(item)

    def answer(self, request_id: int, answer: Answer) -> None:
        pending = self._requests.pop(request_id, None)
        if pending is not None:
            pending.handler(answer)

    def fail(self, request_id: int, error: Error, send: Callable[[bytes], None]) -> None:
        pending = self._requests.get(request_id)
        if pending is None:
            return
        if error.code == "lost" and pending.start_again():
            send(pending.frame)
        elif self._requests.pop(request_id, None) is not None:
            pending.handler(exception_of(error))


class Incoming:
    """What comes on one connection.

    send: puts a frame on the connection.
    welcome: the node's answer to hello, once it has come.
    complaint: why the node is about to close the connection, where it has said so.
    """

    def __init__(self, replies: Replies, send: Callable[[bytes], None]) -> None:
        self.welcome: Welcome | None = None
        self.complaint: AlbireoError | None = None
        self._replies = replies
        self._send = send
        self._splitter = FrameSplitter()

    def feed(self, data: bytes) -> None:
        """Takes bytes as they come.  Raises ConnectionLost when they are no frames."""
        try:
            for payload in self._splitter.feed(data):
                message = _decode(payload)
                if type(message) is Deltas:
                    self._replies.take(message.items, self._send)
                else:
                    self._other(message)
        except (msgspec.MsgspecError, UnicodeDecodeError, FrameTooLarge) as error:
            raise ConnectionLost(f"the node sent what is not of the protocol: {error}") from None

    def why_closed(self) -> AlbireoError:
        """The error for a connection that the node has closed."""
        return self.complaint or ConnectionLost("the node closed the connection", retry=True)

    def _other(self, message: object) -> None:
        if isinstance(message, Error):
            if message.id is not None:
                self._replies.fail(message.id, message, self._send)
            else:
                # Where it does not end the connection, it is about no request of ours.
                last = message.code in _LAST_CODES
                self.complaint = exception_of(message) if last else None
        elif isinstance(message, Tokens | Text | ModelList | NodeStatus):
            self._replies.answer(message.id, message)
        elif isinstance(message, Welcome):
            self.welcome = message


def as_error(reply: Reply) -> AlbireoError:
    """The error to raise for a reply that is not the one that was waited for."""
    if isinstance(reply, AlbireoError):
        return reply
    return InternalError(f"the node answered with an unexpected {type(reply).__name__}")
