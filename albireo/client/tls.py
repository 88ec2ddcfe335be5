"""Connections over TCP with TLS, to a node started with `--listen`.

The blocking client reads on one thread and writes on others.  OpenSSL allows
one call at a time on a connection, and a read that waits would hold up the
writes: so bytes and socket are apart here (memory BIOs), and nothing waits
under the lock.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
import time
from types import TracebackType
from typing import Self

_READ_BYTES = 64 * 1024


class TlsConnection:
    """What the blocking client needs of a socket: recv, sendall, settimeout, shutdown, close.

    Any thread may read while another writes; two may not do the same.
    """

    def __init__(self, raw: socket.socket, context: ssl.SSLContext, host: str) -> None:
        self._raw = raw
        self._lock = threading.Lock()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=host)

    @classmethod
    def open(cls, host: str, port: int, context: ssl.SSLContext, timeout_s: float) -> Self:
        """Connects and shakes hands, within the time.  Raises OSError (ssl.SSLError is one)."""
        deadline = time.monotonic() + timeout_s
        raw = socket.create_connection((host, port), timeout_s)
        try:
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            connection = cls(raw, context, host)
            connection._shake_hands(deadline)
        except BaseException:
            raw.close()
            raise
        return connection

    def recv(self, size: int) -> bytes:
        """Decrypted bytes; b"" at the end of the connection."""
        while True:
            with self._lock:
                try:
                    return self._tls.read(size)
                except ssl.SSLWantReadError:
                    pass
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    return b""
            self._take(self._raw.recv(_READ_BYTES))

    def sendall(self, data: bytes) -> None:
        with self._lock:
            self._tls.write(data)
            encrypted = self._outgoing.read()
        self._raw.sendall(encrypted)

    def settimeout(self, seconds: float | None) -> None:
        self._raw.settimeout(seconds)

    def shutdown(self, how: int) -> None:
        """Of the TCP connection: frames say themselves where they end."""
        self._raw.shutdown(how)

    def close(self) -> None:
        self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _take(self, encrypted: bytes) -> None:
        with self._lock:
            if encrypted:
                self._incoming.write(encrypted)
            else:
                self._incoming.write_eof()

    def _shake_hands(self, deadline: float) -> None:
        done = False
        while not done:
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.do_handshake()
                done = True
            self._raw.settimeout(max(0.001, deadline - time.monotonic()))
            self._raw.sendall(self._outgoing.read())
            if not done:
                self._take(self._raw.recv(_READ_BYTES))
