"""One client's connection: frames in and out, and the bounds that protect the others.

Bytes become messages here (decode.py), and only well-formed ones reach the Handler.
What is malformed is answered; the connection goes on as long as the boundaries of
frames are known.

A client that reads slowly pauses its transport.  From then on its new tokens
are merged, request by request, so what is held is bounded by the text itself,
and written when it reads again.  Other answers wait too, and when they exceed
a limit nothing more is read from the client.  One over TCP that takes nothing for
STALL_TIMEOUT_S is gone.

An id is in use from its request until its last answer is with the transport.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any, Protocol, cast

import msgspec

from albireo.ipc.framing import FrameEncoder, FrameSplitter, FrameTooLarge
from albireo.ipc.keys import ApiKeys
from albireo.ipc.protocol import (
    MAX_FRAME_BYTES,
    Delta,
    Deltas,
    Error,
    Hello,
    Welcome,
)
from albireo.ipc.rough_size import rough_bytes
from albireo.ipc.stalls import StallTimer

from .decode import UNDECODABLE, decode_message, explained, owner_of, read_hello, request_id_of
from .held import Held, halved
from .requests import Refusal, TextRequest, TokenRequest

MAX_IN_FLIGHT = 4096
HELLO_TIMEOUT_S = 10.0
STALL_TIMEOUT_S = 120.0
WRITE_BUFFER_BYTES = 256 * 1024
MAX_HELD_ANSWER_BYTES = 1024 * 1024
MERGED_FRAME_BYTES = 128 * 1024
CLOSE_TIMEOUT_S = 2.0

_log = logging.getLogger(__name__)
_PREFIX_BYTES = 4


class Handler(Protocol):
    """What a session needs from the router."""

    def opened(self, session: Session) -> Refusal | None:
        """A client has connected; it is sent away with the Refusal."""

    def known(self, session: Session) -> Refusal | None:
        """Its tenant is known; it is sent away with the Refusal."""

    def closed(self, session: Session) -> None:
        """The client is gone: nothing can be sent any more."""

    def greeted(self, session: Session) -> None:
        """It has said hello, and can be spoken to."""

    def welcome(self) -> Welcome: ...

    def handle(self, session: Session, message: Any) -> None:
        """A valid message, not Hello.  Raises Refusal for a request that it does not take."""

    def give_up(self, session: Session, request_id: int, refusal: Refusal) -> bool:
        """Ends a request with an error; False when there is none with this id."""


class Session(asyncio.Protocol):
    """The server's end of a connection.

    encoder: may be shared by all sessions of a loop.
    requests: in flight on this connection, by the client's id.
    client: its name of itself.  connection: the router's name for the connection.
    keys: one of them must be in its hello, and names the tenant of all its requests; None = it is
        a process of this user, and `tenant` is "".
    owner: digest of its session's name; b"" = its requests end with the connection.
    outbox: Deltas of the batch that the router is working on; see flush().
    """

    def __init__(
        self, handler: Handler, encoder: FrameEncoder, keys: ApiKeys | None = None
    ) -> None:
        self.requests: dict[int, TokenRequest | TextRequest] = {}
        self.outbox: list[Delta] = []
        self.client = ""
        self.connection = ""
        self.tenant = ""
        self.remote = keys is not None
        self.owner = b""
        self._keys = keys
        self._handler = handler
        self._encoder = encoder
        self._splitter = FrameSplitter()
        self._transport: asyncio.Transport
        self._greeted = False
        self._closing = False
        self._paused = False
        self._held: dict[int, Held] = {}
        self._held_answers: list[bytes] = []
        self._held_answer_bytes = 0
        self._hello_timer: asyncio.TimerHandle | None = None
        self._stall_timer = StallTimer()

    # ------------------------------------------------------------------ asyncio.Protocol
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes, but have their methods.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_BUFFER_BYTES)
        refusal = self._handler.opened(self)
        if refusal is not None:
            self._end(refusal.code, refusal.message, retry=refusal.retry)
            return
        self._hello_timer = asyncio.get_running_loop().call_later(HELLO_TIMEOUT_S, self._no_hello)

    def data_received(self, data: bytes) -> None:
        if self._closing:
            return
        try:
            payloads = self._splitter.feed(data)
        except FrameTooLarge as error:
            self._end("too_large", f"{error}; the connection is closed")
            return
        for payload in payloads:
            if not self._closing:
                self._receive(payload)

    def eof_received(self) -> bool:
        """Nothing more is written: with TLS it takes a while until the connection is lost."""
        self._closing = True
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._closing = True
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        self._stall_timer.stop()
        self._held.clear()
        self._held_answers.clear()
        self._handler.closed(self)

    def pause_writing(self) -> None:
        self._paused = True
        if self.remote:
            self._stall_timer.start(self._transport, STALL_TIMEOUT_S)

    def resume_writing(self) -> None:
        self._paused = False
        self._stall_timer.stop()
        self._write_held()

    # ------------------------------------------------------------------ for the router
    def send(self, message: msgspec.Struct, request_id: int) -> None:
        """Sends the only answer to a request (not a stream)."""
        frame = self._encoder.encode(message)
        if len(frame) - _PREFIX_BYTES > MAX_FRAME_BYTES:
            message = Error(
                id=request_id,
                code="invalid_request",
                message=f"the answer would be a frame of {len(frame)} bytes; the limit is "
                f"{MAX_FRAME_BYTES}: split the request",
            )
            frame = self._encoder.encode(message)
        self._write_answer(frame)

    def flush(self) -> None:
        """Sends the outbox, as one frame, or merges it with what is held already."""
        items, self.outbox = self.outbox, []
        if self._closing:
            return
        if self._paused or self._held:
            self._hold(items)
        else:
            self._write_deltas(items)

    def fail(self, error: Error) -> None:
        """Ends a stream with an error, behind the tokens that it has had."""
        assert error.id is not None
        if self._closing:
            return
        if self._paused or self._held:
            self._held.setdefault(error.id, Held()).error = error
        else:
            self._transport.write(self._encoder.encode(error))

    def close(self) -> None:
        """Closes the connection once what is written has been sent, or some time has passed."""
        self._closing = True
        self._transport.close()
        asyncio.get_running_loop().call_later(CLOSE_TIMEOUT_S, self._transport.abort)

    def dismiss(self, refusal: Refusal) -> None:
        """The same; the client hears why, and need not look for the node."""
        self._end(refusal.code, refusal.message, retry=refusal.retry)

    def abort(self) -> None:
        """Ends the connection: its client has another one."""
        self._closing = True
        self._transport.abort()

    # ------------------------------------------------------------------ in
    def _receive(self, payload: bytes) -> None:
        if not self._greeted:
            self._greet(payload)
            return
        request_id = None
        try:
            request_id = request_id_of(payload)
            message = decode_message(payload)
        except MemoryError:
            # Without its id there is no answer: its client connects again, and asks again.
            _log.error(
                "a message of %d bytes of %s needs too much memory", len(payload), self.client
            )
            self.abort()
            return
        except UNDECODABLE as error:
            self._refuse(request_id, explained(error))
            return
        if isinstance(message, Hello):
            self._refuse(None, Refusal("invalid_request", "hello comes once, as the first message"))
            return
        try:
            self._handler.handle(self, message)
        except Refusal as refusal:
            self._refuse(message.id, refusal)
        except MemoryError:
            raise  # ends this process: see Actor.end_without_memory()
        except Exception:
            _log.exception("request %d of %s could not be handled", message.id, self.client)
            fault = Refusal("internal", "the request met a fault in the router")
            if not self._handler.give_up(self, message.id, fault):
                self._refuse(message.id, fault)

    def check_id(self, request_id: int) -> None:
        """Raises Refusal when a new request cannot have this id."""
        if self._uses(request_id):
            raise Refusal(
                "invalid_request",
                f"id {request_id} is in use by a request in flight on this connection",
                param="id",
            )

    def check_room(self) -> None:
        """Raises Refusal when another request in flight would be one too many."""
        if len(self.requests) + len(self._held) < MAX_IN_FLIGHT:
            return
        # A request that goes on may have tokens held.
        if len(self.requests.keys() | self._held.keys()) >= MAX_IN_FLIGHT:
            raise Refusal(
                "queue_full",
                f"{MAX_IN_FLIGHT} requests are in flight on this connection, which is the limit: "
                "wait for answers, and read them",
                retry=True,
            )

    def _greet(self, payload: bytes) -> None:
        try:
            hello = read_hello(payload)
        except Refusal as refusal:
            self._end(refusal.code, refusal.message)
            return
        self.owner = owner_of(hello.session)
        self.client = hello.client[:80]
        if self._keys is not None and not self._know(hello.api_key):
            return
        self._greeted = True
        if self._hello_timer is not None:
            self._hello_timer.cancel()
        self._write_answer(self._encoder.encode(self._handler.welcome()))
        self._handler.greeted(self)

    def _know(self, key: str) -> bool:
        """Whether the key is one of ours; a client without one is sent away."""
        assert self._keys is not None
        name = self._keys.name_of(key)
        if name is None:
            self._end(
                "unauthenticated",
                "the API key is none of this node's"
                if key
                else "this node asks clients over TCP for an API key: give one in hello "
                "(connect(..., api_key=KEY), --api-key-file FILE of commands)",
            )
            return False
        self.tenant = name
        refusal = self._handler.known(self)
        if refusal is not None:
            self._end(refusal.code, refusal.message, retry=refusal.retry)
        return refusal is None

    def _no_hello(self) -> None:
        self._end("protocol", f"no hello came within {HELLO_TIMEOUT_S:g} s")

    def _uses(self, request_id: int) -> bool:
        return request_id in self.requests or request_id in self._held

    def _refuse(self, request_id: int | None, refusal: Refusal) -> None:
        """Answers with an Error: without an id where it would seem to end another request."""
        if request_id is not None and self._uses(request_id):
            request_id = None
        error = Error(
            id=request_id,
            code=refusal.code,
            message=refusal.message,
            param=refusal.param,
            retry=refusal.retry,
        )
        self._write_answer(self._encoder.encode(error))

    def _end(self, code: str, message: str, retry: bool = False) -> None:
        """Says why, ahead of all that is held, and closes the connection."""
        if not self._closing:
            error = Error(id=None, code=code, message=message, retry=retry)
            self._transport.write(self._encoder.encode(error))
            self.close()

    # ------------------------------------------------------------------ out
    def _write_answer(self, frame: bytes) -> None:
        if self._closing:
            return
        if not self._paused:
            self._transport.write(frame)
            return
        self._held_answers.append(frame)
        self._held_answer_bytes += len(frame)
        if self._held_answer_bytes > MAX_HELD_ANSWER_BYTES:
            self._transport.pause_reading()

    def _write_deltas(self, items: list[Delta]) -> None:
        frame = self._encoder.encode(Deltas(items=items))
        if len(frame) - _PREFIX_BYTES > MAX_FRAME_BYTES:
            if len(items) == 1:
                items = halved(items[0])
            if len(items) > 1:
                half = len(items) // 2
                self._write_deltas(items[:half])
                self._write_deltas(items[half:])
                return
        self._transport.write(frame)

    def _hold(self, items: list[Delta]) -> None:
        for item in items:
            self._held.setdefault(item.id, Held()).add(item)

    def _write_held(self) -> None:
        """Writes what was held until the transport pauses again."""
        if self._closing:
            return
        if self._held_answers:
            for frame in self._held_answers:
                self._transport.write(frame)
            self._held_answers.clear()
            self._held_answer_bytes = 0
            self._transport.resume_reading()
        while self._held and not self._paused:
            items: list[Delta] = []
            errors: list[Error] = []
            size = 0
            while self._held and size < MERGED_FRAME_BYTES:
                request_id, held = next(iter(self._held.items()))
                if held.answers:
                    items.append(held.take(request_id))
                    size += rough_bytes(items[-1])
                if not held.answers:
                    del self._held[request_id]
                    if held.error is not None:
                        errors.append(held.error)
            if items:
                self._write_deltas(items)
            for error in errors:
                self._transport.write(self._encoder.encode(error))
