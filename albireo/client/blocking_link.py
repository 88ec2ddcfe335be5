"""The blocking client's connections, one after the other: async_link.py has the picture.

run() is the reader's thread: it reads, and connects again.  Frames are written
by whichever thread has one, but never by the reader; see _Writer for both, and
for why that never blocks on a lock.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections import deque
from collections.abc import Callable

from albireo.ipc.protocol import Welcome

from .endpoint import CONNECT_TIMEOUT_S, Connection, Endpoint
from .errors import AlbireoError, ConnectionLost, NodeNotRunning
from .reconnect import Backoff
from .replies import Incoming, Pending, Replies
from .requests import hello

_READ_BYTES = 256 * 1024


class Link:
    """open() it, and have a thread run() it.

    api_key: that a node asks for over TCP.
    reconnect_s: how long the node may be away before requests in flight end.
    """

    def __init__(
        self,
        where: Endpoint,
        client_name: str,
        api_key: str,
        reconnect_s: float,
        replies: Replies,
    ) -> None:
        self.welcome: Welcome
        self._where = where
        self._client_name = client_name
        self._api_key = api_key
        self._reconnect_s = reconnect_s
        self._replies = replies
        self._connection: Connection | None = None
        self._incoming: Incoming
        self._writer: _Writer | None = None
        self._handover = threading.Lock()
        """What is asked goes to one connection: with those that it begins with, or after them."""
        self._reader = 0
        """run()'s thread; 0 until it runs."""
        self._wanted = threading.Event()
        """Somebody asks, without a connection; or all is over."""
        self._closing = threading.Event()

    def open(self) -> None:
        """Connects.  Raises NodeNotRunning, ProtocolMismatch, or another AlbireoError."""
        connection: Connection | None = None
        try:
            connection = self._connection = self._where.open(CONNECT_TIMEOUT_S)
            self._incoming = incoming = Incoming(self._replies, self.write)
            self.welcome = self._greet(connection, incoming)
            connection.settimeout(None)
        except BaseException as error:
            if connection is not None:
                connection.close()
            if isinstance(error, TimeoutError):
                raise NodeNotRunning(
                    f"the node at {self._where.shown} did not answer within "
                    f"{CONNECT_TIMEOUT_S:g} s",
                    retry=True,
                ) from None
            if isinstance(error, OSError) and not isinstance(error, AlbireoError):
                raise self._where.error(error) from None
            raise
        writer = _Writer(connection, self._reading)
        with self._handover:
            # Published first: a Cancel that comes while it is found out what goes on waits here.
            self._writer = writer
            writer.begin(self._replies.again())
        writer.flush()

    def ask(self, request_id: int, pending: Pending) -> None:
        """Puts a request in flight.  Without a connection it is the first thing that the next one
        is told."""
        with self._handover:
            self._replies.begin(request_id, pending)
            writer = self._writer
        if writer is not None:
            writer.write(pending.frame)
        else:
            self._wanted.set()

    def write(self, encoded: bytes) -> None:
        """Sends a frame, where there is a connection."""
        writer = self._writer
        if writer is not None:
            writer.write(encoded)

    def close(self) -> None:
        """Has run() return; Replies are closed before."""
        self._closing.set()
        self._wanted.set()
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def run(self) -> None:
        """Until the client is closed."""
        self._reader = threading.get_ident()
        while self._replies.closed is None:
            error, broke = self._read()
            self._writer = None
            self._wanted.clear()
            if self._replies.closed is not None:
                break
            if broke:
                self._replies.break_off(self.welcome.resume_s > 0)
                connected = self._try(Backoff(self._reconnect_s))
            else:
                self._replies.lose(error)
                connected = False
            while not connected and self._replies.closed is None:
                self._wanted.wait()
                self._wanted.clear()
                connected = self._try(Backoff(0.0))
        assert self._connection is not None
        self._connection.close()

    def _reading(self) -> bool:
        return threading.get_ident() == self._reader

    def _try(self, backoff: Backoff) -> bool:
        """Connects again; False when the time is over, or the client is closed."""
        while self._replies.closed is None:
            try:
                self.open()
                return True
            except AlbireoError as error:
                wait = backoff.next() if error.retry else None
                if wait is None:
                    self._replies.lose(error)
                    return False
            self._closing.wait(wait)
        return False

    def _greet(self, connection: Connection, incoming: Incoming) -> Welcome:
        """Says hello and waits for the Welcome."""
        deadline = time.monotonic() + CONNECT_TIMEOUT_S
        connection.sendall(hello(self._client_name, self._replies.session, self._api_key))
        while incoming.welcome is None:
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            data = connection.recv(_READ_BYTES)
            if not data:
                raise incoming.why_closed()
            incoming.feed(data)
        return incoming.welcome

    def _read(self) -> tuple[AlbireoError, bool]:
        """Reads until the connection is over; why, and whether it broke without a word."""
        connection, incoming = self._connection, self._incoming
        assert connection is not None
        with connection:
            try:
                while data := connection.recv(_READ_BYTES):
                    incoming.feed(data)
            except OSError as error:
                why = ConnectionLost(f"the connection to the node broke: {error}", retry=True)
                return incoming.complaint or why, incoming.complaint is None
            except AlbireoError as error:
                return error, False
        return incoming.why_closed(), incoming.complaint is None


class _Writer:
    """Frames onto the socket, in order, from any thread, once it has begun.

    Whoever finds the socket free writes all that waits; the others leave their
    frame and go.  So a stream that is dropped by the garbage collector, in the
    middle of a write of the same thread, can leave its Cancel without a deadlock.

    The reader has another thread write.  A node stops reading when its answers are
    not read: if the reader waited for it meanwhile, both would wait for ever.

    reading: whether it is called on the reader's thread.
    """

    def __init__(self, connection: Connection, reading: Callable[[], bool]) -> None:
        self._connection = connection
        self._reading = reading
        self._frames: deque[bytes] = deque()
        self._busy = threading.Lock()
        self._busy.acquire()

    def begin(self, first: list[bytes]) -> None:
        """Puts these ahead of what has been left by now; all is written from now on."""
        self._frames.extendleft(reversed(first))
        self._busy.release()

    def write(self, encoded: bytes) -> None:
        self._frames.append(encoded)
        self.flush()

    def flush(self) -> None:
        """Sees to it that what waits is written."""
        if not self._take():
            return
        if self._reading():
            another = threading.Thread(
                target=self._drain, name="albireo client writer", daemon=True
            )
            with contextlib.suppress(RuntimeError):
                another.start()
                return
            # No thread can be had; nearly always the node does read.
        self._drain()

    def _take(self) -> bool:
        """Whether there is something to write, and the socket was free; now it is not."""
        return bool(self._frames) and self._busy.acquire(blocking=False)

    def _drain(self) -> None:
        """A connection that breaks here is noticed, and reported, by the reader."""
        taken = True
        while taken:
            try:
                while self._frames:
                    self._connection.sendall(self._frames.popleft())
            except OSError:
                self._frames.clear()
            except BaseException:
                # Ctrl-C in the middle of a frame: what followed would be taken for its rest.
                with contextlib.suppress(OSError):
                    self._connection.shutdown(socket.SHUT_RDWR)
                raise
            finally:
                self._busy.release()
            taken = self._take()
