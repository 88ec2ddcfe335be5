"""A listening TCP socket whose connections speak TLS, of router and gateway: handshakes are
bounded in time and in number.

Connections are accepted one by one, and only while there is room for another
handshake: the rest wait in the kernel's queue.  What is in its handshake is nobody's
connection yet, so it is counted here.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
import ssl
from collections import Counter
from collections.abc import Callable
from typing import Any

from .tls import HANDSHAKE_TIMEOUT_S

MAX_HANDSHAKES = 512
MAX_HANDSHAKES_OF_ONE_ADDRESS = 256
_BACKLOG = 1024
_NO_FILES_S = 0.1

_log = logging.getLogger(__name__)


class TlsDoor:
    """listener: a bound TCP socket.  make: gives the protocol of a connection that has shaken
    hands."""

    def __init__(
        self, listener: socket.socket, context: ssl.SSLContext, make: Callable[[], Any]
    ) -> None:
        self._listener = listener
        self._context = context
        self._make = make
        self._room = asyncio.Semaphore(MAX_HANDSHAKES)
        self._addresses: Counter[str] = Counter()
        self._shaking: set[asyncio.Task[None]] = set()
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        self._accepting = asyncio.ensure_future(self._accept())

    def close(self) -> None:
        """Accepts nobody more, and drops those whose handshake is not over."""
        for each in (self._accepting, *self._shaking):
            each.cancel()

    async def wait_closed(self) -> None:
        """Returns when what close() has ended is gone, and the socket closed."""
        await asyncio.gather(self._accepting, *self._shaking, return_exceptions=True)
        self._listener.close()

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._room.acquire()
            try:
                connection, address = await loop.sock_accept(self._listener)
            except OSError as error:
                # Without open files it stays readable: asked again at once it would spin.
                self._room.release()
                _log.warning("a connection over TCP cannot be accepted: %s", error)
                await asyncio.sleep(_NO_FILES_S)
                continue
            host = address[0]
            if self._addresses[host] >= MAX_HANDSHAKES_OF_ONE_ADDRESS:
                connection.close()
                self._room.release()
                continue
            self._addresses[host] += 1
            task = loop.create_task(self._shake_hands(connection, host))
            self._shaking.add(task)
            task.add_done_callback(functools.partial(self._over, host))

    async def _shake_hands(self, connection: socket.socket, host: str) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                self._make,
                connection,
                ssl=self._context,
                ssl_handshake_timeout=HANDSHAKE_TIMEOUT_S,
            )
        except OSError as error:  # ssl.SSLError and time-outs are some
            _log.debug("no TLS with %s: %s", host, error)

    def _over(self, host: str, task: asyncio.Task[None]) -> None:
        self._shaking.discard(task)
        self._room.release()
        self._addresses[host] -= 1
        if not self._addresses[host]:
            del self._addresses[host]
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a TLS handshake with %s has failed", host, exc_info=error)
