"""The HTTP server: uvicorn on the supervisor's sockets, with bounds on each connection.

uvicorn limits neither the size of a request's head nor the time that it may take,
nor for how long a client may read nothing, loses the body of a request that offers
another protocol, and answers HTTP/1.0 in chunks; Connection sees to it.  Signals are
the supervisor's business, so uvicorn's handlers for them stay out.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Iterator
from typing import Any

import httptools
import uvicorn
from uvicorn._types import ASGISendEvent
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from albireo.ipc.open_files import raise_open_files
from albireo.ipc.stalls import StallTimer
from albireo.ipc.tls_door import TlsDoor

from .http import CHUNKS

MAX_HEAD_BYTES = 64 * 1024
HEAD_TIMEOUT_S = 20.0
STALL_TIMEOUT_S = 120.0
KEEP_ALIVE_S = 60
GRACE_S = 1
_BACKLOG = 2048
_SPARE_FDS = 64


class _Http10Cycle(RequestResponseCycle):
    """A request in HTTP/1.0 and its answer, which has no chunks (RFC 9112, 6.1): one of unknown
    length ends with the connection."""

    _until_close = False

    async def send(self, message: ASGISendEvent) -> None:
        if message["type"] == "http.response.start":
            if all(name != b"content-length" for name, _ in message["headers"]):
                self._until_close = True
                self.chunked_encoding = False
        elif self._until_close and message["type"] == "http.response.body":
            self.expected_content_length = len(message.get("body", b""))
        await super().send(message)


class Connection(HttpToolsProtocol):
    """One HTTP connection.

    Its requests' heads come within HEAD_TIMEOUT_S and MAX_HEAD_BYTES; a client
    that reads nothing of what waits for it for STALL_TIMEOUT_S is gone.

    An Upgrade is ignored (RFC 9110, 7.8): many clients offer h2c with every request.
    To httptools such a message ends with its head, and what follows is of the other
    protocol; so a new parser reads the head again, without the field, and goes on.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._head_bytes = 0
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer = StallTimer()
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_came()
        self._stall_timer.stop()
        super().connection_lost(exc)
        # uvicorn leaves the timer of a connection that was reset; it would keep all this alive.
        self._unset_keepalive_if_required()
        # Both lead back here: without them all of it goes at once, and not with one of the
        # garbage collector's full rounds, of which there are few.
        self.cycle = None  # type: ignore[assignment]
        self.scope = {}  # type: ignore[typeddict-item]

    def data_received(self, data: bytes) -> None:
        """As uvicorn does it, but data of any kind is no reason to keep an idle connection: only a
        request is, from its first byte on."""
        try:
            self._parse(memoryview(data))
        except httptools.HttpParserError:
            msg = "Invalid HTTP request received."
            self.logger.warning(msg)
            self.send_400_response(msg)
        if self._head_timer is not None:
            self._head_bytes += len(data)
            if self._head_bytes > MAX_HEAD_BYTES and not self.transport.is_closing():
                self.send_400_response(f"The head of a request has at most {MAX_HEAD_BYTES} bytes.")

    def _parse(self, data: memoryview) -> None:
        """Raises HttpParserError."""
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as upgrade:
                if not self._offers_upgrade():
                    return
                data = data[upgrade.args[0] :]
            head = self._head_without_upgrade()
            self.parser = httptools.HttpRequestParser(self)
            self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
            self.parser.feed_data(head)

    def _offers_upgrade(self) -> bool:
        """Of the message at hand; CONNECT is an upgrade to httptools too, and has no body."""
        return self.parser.should_upgrade() and self.parser.get_method() != b"CONNECT"

    def _head_without_upgrade(self) -> bytes:
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        fields = [b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade"]
        return b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, b"".join(fields))

    def on_message_begin(self) -> None:
        self._expect_head()
        self._unset_keepalive_if_required()
        super().on_message_begin()
        extensions: dict[str, Any] = {CHUNKS: self}
        self.scope["extensions"] = extensions

    def on_headers_complete(self) -> None:
        if not self._offers_upgrade():
            self._head_came()
            super().on_headers_complete()
            if self.scope["http_version"] == "1.0":
                # Of the class that uvicorn makes; its task has not begun.
                self.cycle.__class__ = _Http10Cycle
                self.scope["extensions"] = {}

    def on_message_complete(self) -> None:
        if not self._offers_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self._head_timer is not None:
            # The next request has begun; from now on the rest of its head can come.
            self._unset_keepalive_if_required()
            self._stop_head_timer()
            self._expect_head()

    def pause_writing(self) -> None:
        self._stall_timer.start(self.transport, STALL_TIMEOUT_S)
        super().pause_writing()

    def resume_writing(self) -> None:
        self._stall_timer.stop()
        super().resume_writing()

    def can_write(self) -> bool:
        return not self.flow.write_paused and not self.transport.is_closing()

    def write_chunk(self, data: bytes) -> None:
        self.transport.write(b"%x\r\n%b\r\n" % (len(data), data))

    def _expect_head(self) -> None:
        if self._head_timer is None:
            self._head_timer = self.loop.call_later(HEAD_TIMEOUT_S, self._no_head)

    def _no_head(self) -> None:
        self._head_timer = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
        else:  # What comes behind a request may not be read before it is answered.
            self._expect_head()

    def _head_came(self) -> None:
        self._head_bytes = 0
        self._stop_head_timer()

    def _stop_head_timer(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None


class _Server(uvicorn.Server):
    """Serves sockets of either family, and leaves signals alone."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await self.lifespan.startup()
        loop = asyncio.get_running_loop()

        def connection() -> asyncio.Protocol:
            return Connection(self.config, self.server_state, self.lifespan.state, loop)

        self.servers: list[Any] = []
        tls = self.config.ssl
        for each in sockets or []:
            unix = each.family == socket.AF_UNIX
            if tls is not None and not unix:
                self.servers.append(TlsDoor(each, tls, connection))
                continue
            listen = loop.create_unix_server if unix else loop.create_server
            self.servers.append(await listen(connection, sock=each, backlog=_BACKLOG))
        self.started = True

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:  # type: ignore[override]
        yield


class HttpServer:
    """`await serve()` until stop() is called; requests in flight then have GRACE_S.

    tls: TCP sockets speak HTTPS; Unix sockets never do.
    """

    def __init__(
        self, app: Any, sockets: list[socket.socket], tls: ssl.SSLContext | None = None
    ) -> None:
        config = uvicorn.Config(
            app,
            http=Connection,
            ws="none",
            loop="none",
            lifespan="off",
            interface="asgi3",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=GRACE_S,
            limit_concurrency=_most_connections(),
        )
        self._sockets = sockets
        config.load()
        config.ssl = tls
        self._server = _Server(config)

    async def serve(self) -> None:
        await self._server.serve(self._sockets)

    def stop(self) -> None:
        self._server.should_exit = True


def _most_connections() -> int:
    """A connection needs an open file."""
    return max(16, raise_open_files() - _SPARE_FDS)
