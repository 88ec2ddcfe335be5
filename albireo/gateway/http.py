"""One HTTP request as the endpoints see it: head, body within limits, and the ways to answer.

A thin layer over ASGI, because an event of a stream has to cost microseconds.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Protocol

from .errors import HttpError, invalid

MAX_BODY_BYTES = 8 * 1024 * 1024
BODY_TIMEOUT_S = 60.0

CHUNKS = "albireo.chunks"
"""Name of an ASGI extension of our server: a ChunkWriter."""

Scope = MutableMapping[str, Any]
AsgiReceive = Callable[[], Awaitable[MutableMapping[str, Any]]]
AsgiSend = Callable[[MutableMapping[str, Any]], Awaitable[None]]

_JSON = (b"content-type", b"application/json")
_EVENTS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # nginx would hold tokens back otherwise
    (b"x-accel-buffering", b"no"),
)
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:/+=@-]{1,128}")


class ChunkWriter(Protocol):
    """Writes pieces of a started stream of events at once: what send() does, without the
    coroutine, which is half of what an event costs in Python."""

    def can_write(self) -> bool:
        """Whether the client is there, and reads."""

    def write_chunk(self, data: bytes) -> None: ...


class Request:
    """id: of the header X-Request-Id, where it is a plain one, or a new one.

    tenant: name of the API key.  started: the answer's status is out.
    chunks: None under another server than ours.  stream_interval: tokens of an event.
    grammar: the field that asks for one, for errors about it.
    """

    __slots__ = (
        "_headers",
        "_send",
        "chunks",
        "grammar",
        "id",
        "method",
        "path",
        "receive",
        "started",
        "stream_interval",
        "tenant",
    )  # fmt: skip

    def __init__(
        self, scope: Scope, receive: AsgiReceive, send: AsgiSend, stream_interval: int = 1
    ) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.receive = receive
        self.chunks: ChunkWriter | None = scope.get("extensions", {}).get(CHUNKS)
        self.stream_interval = stream_interval
        self.grammar = "response_format"
        self.tenant = ""
        self.started = False
        self._send = send
        self._headers: list[tuple[bytes, bytes]] = scope["headers"]
        given = self.header(b"x-request-id")
        self.id = given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(16)

    def header(self, name: bytes) -> str:
        """The first header of that (lower-case) name, or ""."""
        for each, value in self._headers:
            if each == name:
                return value.decode("latin-1")
        return ""

    async def body(self) -> bytes:
        """The whole body.  Raises HttpError (413, 408), or ClientGone."""
        length = self.header(b"content-length")
        if length.isdecimal() and int(length) > MAX_BODY_BYTES:
            raise _too_large(length)
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(BODY_TIMEOUT_S):
                while True:
                    message = await self.receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    piece: bytes = message.get("body", b"")
                    pieces.append(piece)
                    size += len(piece)
                    if size > MAX_BODY_BYTES:
                        raise _too_large("more")
                    if not message.get("more_body", False):
                        return b"".join(pieces)
        except TimeoutError:
            raise HttpError(
                408, f"the body did not come within {BODY_TIMEOUT_S:g} s", code="timeout",
                headers=((b"connection", b"close"),),
            ) from None  # fmt: skip

    async def answer(
        self,
        status: int,
        body: bytes,
        headers: tuple[tuple[bytes, bytes], ...] = (),
        content_type: tuple[bytes, bytes] = _JSON,
    ) -> None:
        """Sends a whole answer."""
        await self._start(
            status,
            [*((content_type,) if body else ()), (b"content-length", b"%d" % len(body)), *headers],
        )
        await self._send({"type": "http.response.body", "body": body, "more_body": False})

    async def fail(self, error: HttpError) -> None:
        """Answers with an error."""
        await self.answer(error.status, error.body(), error.headers)

    async def start_events(self) -> None:
        """The head of a stream of events; send_events() follows, up to the last."""
        await self._start(200, list(_EVENTS))

    async def send_events(self, data: bytes, last: bool = False) -> None:
        """Returns when the client's connection takes more."""
        await self._send({"type": "http.response.body", "body": data, "more_body": not last})

    async def gone(self) -> None:
        """Returns when the client has left, or has had its answer.  Call after body()."""
        while (await self.receive())["type"] != "http.disconnect":
            pass

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        headers.append((b"x-request-id", self.id.encode()))
        self.started = True
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def adopt_id(self, given: str | None) -> None:
        """Takes the id that the body names.  Raises HttpError."""
        if given is None:
            return
        if not _REQUEST_ID.fullmatch(given):
            raise invalid(
                "request_id must be 1 to 128 letters, digits or characters of ._:/+=@-",
                "request_id",
            )
        self.id = given


class ClientGone(Exception):
    """The client has closed the connection: nobody wants the answer."""


def _too_large(size: str) -> HttpError:
    return HttpError(
        413,
        f"the body has {size} bytes; at most {MAX_BODY_BYTES} are accepted",
        code="too_large",
        headers=((b"connection", b"close"),),
    )
