"""The asyncio client's connections, one after the other.

connected ──── it breaks ───▶ reconnecting ── time over ──▶ offline
    ▲  │                        │      ▲                      │
    │  └─ the node says why ────│──────│────────────────────▶ │
    └───────── welcome ─────────┘      └── somebody asks ─────┘
                                           (one try)
"""

from __future__ import annotations

import asyncio
from typing import cast

from albireo.ipc.protocol import Welcome

from .endpoint import CONNECT_TIMEOUT_S, Endpoint
from .errors import AlbireoError, ConnectionLost, NodeNotRunning
from .reconnect import Backoff
from .replies import Incoming, Replies
from .requests import hello


class AsyncLink:
    """Make one, and then open() it.

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
        self._wire: _Wire | None = None
        self._reconnecting: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connects.  Raises NodeNotRunning, AuthenticationError, or another AlbireoError."""
        wire = await self._connect()
        assert wire.incoming.welcome is not None
        self.welcome = wire.incoming.welcome
        self._wire = wire
        wire.on_lost = self._lost
        if wire.lost is not None:
            self._lost(wire.lost)
        for each in self._replies.again():
            wire.write(each)

    def write(self, encoded: bytes) -> None:
        """Sends a frame, where there is a connection."""
        if self._wire is not None:
            self._wire.write(encoded)

    def ask(self, encoded: bytes) -> None:
        """Sends the frame of a request that is in flight; or has a connection made, which it is
        sent on first."""
        if self._wire is not None:
            self._wire.write(encoded)
        elif self._reconnecting is None:
            self._reconnect(0.0)

    async def close(self) -> None:
        if self._reconnecting is not None:
            self._reconnecting.cancel()
            await asyncio.gather(self._reconnecting, return_exceptions=True)
        if self._wire is not None:
            await self._wire.close()

    def _lost(self, error: AlbireoError) -> None:
        """The connection is over."""
        assert self._wire is not None
        broke = self._wire.broke
        self._wire = None
        if self._replies.closed is not None:
            return
        if not broke:
            self._replies.lose(error)
            return
        # Begun first: a handler that asks again would have it tried just once.
        if self._reconnecting is None:
            self._reconnect(self._reconnect_s)
        self._replies.break_off(self.welcome.resume_s > 0)

    def _reconnect(self, most_s: float) -> None:
        self._reconnecting = asyncio.get_running_loop().create_task(self._try(Backoff(most_s)))

    async def _try(self, backoff: Backoff) -> None:
        """Until there is a connection, or the time is over."""
        try:
            error = await self._opened(backoff)
        finally:
            self._reconnecting = None
        if error is not None:
            # With no task left: what a handler asks then has a try of its own.
            self._replies.lose(error)

    async def _opened(self, backoff: Backoff) -> AlbireoError | None:
        """Opens; returns why it could not be done in time."""
        error: AlbireoError | None = None
        while True:
            try:
                await self.open()
            except AlbireoError as found:
                error = found
            if self._wire is not None:
                return None
            wait = None if error is not None and not error.retry else backoff.next()
            if wait is None:
                return error or ConnectionLost("the node closed the connection")
            await asyncio.sleep(wait)

    async def _connect(self) -> _Wire:
        wire = _Wire(self._replies)
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                await self._where.open_async(lambda: wire)
                wire.write(hello(self._client_name, self._replies.session, self._api_key))
                await wire.greeted
        except TimeoutError:
            wire.abort()
            raise NodeNotRunning(
                f"the node at {self._where.shown} did not answer within {CONNECT_TIMEOUT_S:g} s",
                retry=True,
            ) from None
        except AlbireoError:
            raise
        except OSError as error:
            raise self._where.error(error) from None
        except BaseException:
            wire.abort()
            raise
        return wire


class _Wire(asyncio.Protocol):
    """One connection.

    greeted: is done with the node's Welcome.
    lost: why it is over; None while it is not.  on_lost is called with it.
    broke: it ended without a word of the node: the router has died, or the way to it is broken.
    """

    def __init__(self, replies: Replies) -> None:
        self.incoming = Incoming(replies, self.write)
        self.greeted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.lost: AlbireoError | None = None
        self.broke = False
        self.on_lost = _nobody
        self._ended = asyncio.Event()
        self._transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports are none of asyncio's classes, but have their methods.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        try:
            self.incoming.feed(data)
        except ConnectionLost as error:
            self.lost = error
            self.abort()
        if self.incoming.welcome is not None and not self.greeted.done():
            self.greeted.set_result(None)

    def connection_lost(self, error: Exception | None) -> None:
        self.broke = self.lost is None and self.incoming.complaint is None
        self.lost = self.lost or self.incoming.why_closed()
        if not self.greeted.done():
            self.greeted.set_exception(self.lost)
            self.greeted.exception()  # asyncio would warn where nobody waits for it any more
        self._ended.set()
        self.on_lost(self.lost)

    def write(self, encoded: bytes) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(encoded)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    async def close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            await self._ended.wait()


def _nobody(error: AlbireoError) -> None:
    """Before somebody wants to know."""
