"""The router's side of its ZeroMQ links, on the event loop.

ZeroMQ's descriptor is edge-triggered, and a send can swallow an edge: so
everything is drained after each readiness, and once more after each burst of
sends.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import msgspec

from albireo.ipc.link import Hub, PeerGone, PeerStuck
from albireo.ipc.messages import ToRouter

_log = logging.getLogger(__name__)


class AsyncHub:
    """Binds at once; messages are received from listen() on."""

    def __init__(self, path: str) -> None:
        self._hub: Hub[Any] = Hub(path, ToRouter)
        self._receive: Callable[[bytes, Any], None]
        self._loop = asyncio.get_running_loop()
        self._draining = False
        self._drain_due = False
        self._fd = self._hub.fileno()

    def listen(self, receive: Callable[[bytes, Any], None]) -> None:
        """Calls `receive(peer, message)` for every message that arrives."""
        self._receive = receive
        self._loop.add_reader(self._fd, self._drain)
        self._drain_soon()

    def send(self, peer: bytes, message: msgspec.Struct) -> bool:
        """Queues a message; False when the peer is not there or does not read."""
        if self._hub.socket.closed:
            return False
        self._drain_soon()
        try:
            self._hub.send(peer, message)
        except PeerGone:
            return False
        except PeerStuck as error:
            _log.error("%s", error)
            return False
        return True

    def close(self) -> None:
        self._loop.remove_reader(self._fd)
        self._hub.close()

    def _drain_soon(self) -> None:
        if not self._drain_due and not self._draining:
            self._drain_due = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._drain_due = False
        if self._hub.socket.closed:
            return
        self._draining = True
        try:
            for peer, message in self._hub.drain():
                self._receive(peer, message)
        except MemoryError:
            raise  # ends this process: see Actor.end_without_memory()
        except Exception:
            # One message, or what was made of it, ended the loop; those behind it are still
            # to be read, and no other edge will say so.
            _log.exception("a message from an actor of this node could not be handled")
            self._loop.call_soon(self._drain)
        finally:
            self._draining = False
