"""Cuts off who takes nothing of what waits for it; who reads slowly, but reads, is left alone.

A transport's own buffer does not tell the two apart: the kernel takes more from it only when
a third of its own has gone, and with TLS only a part of it is seen.  Over TCP the kernel counts
what the other side has acknowledged.
"""

from __future__ import annotations

import asyncio
import socket

_LOOKS = 4
_BYTES_ACKED = slice(120, 128)  # tcpi_bytes_acked in Linux's struct tcp_info


class StallTimer:
    """Aborts a transport of which nothing has been taken for some time since start()."""

    __slots__ = ("_left", "_pause_s", "_taken", "_timer", "_transport")

    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def start(self, transport: asyncio.Transport, timeout_s: float) -> None:
        """The transport has paused.  It is looked at several times, so it may have a little more
        than the time."""
        self.stop()
        self._transport = transport
        self._pause_s = timeout_s / _LOOKS
        self._taken = _taken(transport)
        self._left = _LOOKS
        self._wait()

    def stop(self) -> None:
        """The transport goes on, or is gone."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
            del self._transport

    def _wait(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._pause_s, self._look)

    def _look(self) -> None:
        taken = _taken(self._transport)
        if taken > self._taken:
            self._taken = taken
            self._left = _LOOKS
        else:
            self._left -= 1
        if self._left:
            self._wait()
        else:
            self._transport.abort()


def _taken(transport: asyncio.Transport) -> int:
    """Grows while the other side reads."""
    its = transport.get_extra_info("socket")
    if its is None:  # a TLS connection that is lost, of which its protocol hears next
        return 0
    if its.family == socket.AF_UNIX:
        return -transport.get_write_buffer_size()
    info = its.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.stop)
    return int.from_bytes(info[_BYTES_ACKED], "little")
