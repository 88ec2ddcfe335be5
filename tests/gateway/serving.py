"""The gateway's real HTTP server in a thread, before a played node; and a client of bare bytes."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import uvloop

from albireo.gateway.app import make_app
from albireo.gateway.server import HttpServer
from albireo.ipc.keys import ApiKeys

from .played import PlayedLink

WAIT_S = 5.0


class Serving:
    """Serves TCP on `port` and the Unix socket `path` until stop()."""

    def __init__(
        self, link: PlayedLink, path: Path, origins: tuple[str, ...] = (), interval: int = 1
    ) -> None:
        self.link = link
        self.path = str(path)
        tcp = socket.socket()
        tcp.bind(("127.0.0.1", 0))
        self.port: int = tcp.getsockname()[1]
        unix = socket.socket(socket.AF_UNIX)
        unix.bind(self.path)
        self._sockets = [tcp, unix]
        self._origins = origins
        self._interval = interval
        self._loop: asyncio.AbstractEventLoop
        self._server: HttpServer
        self._started = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        assert self._started.wait(WAIT_S)
        wait_for(lambda: self._server._server.started)

    def _run(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            app = make_app(
                self.link,
                ApiKeys(),
                self._origins,
                self._interval,  # type: ignore[arg-type]
            )
            self._server = HttpServer(app, self._sockets)
            self._started.set()
            await self._server.serve()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(serve())

    @property
    def connections(self) -> int:
        return len(self._server._server.server_state.connections)

    def stop(self) -> float:
        """Seconds that it took."""
        began = time.monotonic()
        self._server.stop()
        self._thread.join(WAIT_S)
        assert not self._thread.is_alive()
        return time.monotonic() - began


class Bare:
    """A connection that sends what it is told and keeps what it gets."""

    def __init__(self, serving: Serving, receive_bytes: int = 0) -> None:
        self.socket = socket.socket()
        if receive_bytes:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
        self.socket.settimeout(WAIT_S)
        self.socket.connect(("127.0.0.1", serving.port))
        self.got = b""

    def post(self, path: str, body: bytes, headers: str = "") -> None:
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n{headers}\r\n"
        self.socket.sendall(head.encode() + body)

    def until(self, text: bytes) -> bytes:
        """Reads until `text` has come; returns what was read up to it."""
        pieces = [self.got]
        tail = self.got
        while text not in tail:
            data = self.socket.recv(1 << 20)
            if not data:
                raise EOFError(tail)
            pieces.append(data)
            tail = tail[-len(text) :] + data
        found, _, self.got = b"".join(pieces).partition(text)
        return found

    def to_the_end(self) -> bytes:
        while data := self.socket.recv(1 << 16):
            self.got += data
        return self.got

    def close(self) -> None:
        self.socket.close()


def wait_for(true: Callable[[], bool], timeout_s: float = WAIT_S) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, f"not within {timeout_s} s"
        time.sleep(0.005)
