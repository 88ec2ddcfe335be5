"""Where the groups' tokens come in: the router's end of ipc/output_lane.py."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import cast

from albireo.ipc.framing import FrameSplitter
from albireo.ipc.messages import Output, detokenizer_identity
from albireo.ipc.output_lane import MAX_OUTPUT_BYTES, decode_joined, decode_output

_log = logging.getLogger(__name__)


class OutputDoor:
    """Makes a protocol for each connection.

    receive: called with a detokenizer's identity and what it sends.  lost: with the identity of
    one whose connection is over, unless it has another one by now.
    """

    def __init__(
        self, receive: Callable[[bytes, Output], None], lost: Callable[[bytes], None]
    ) -> None:
        self.receive = receive
        self._lost = lost
        self._lanes: dict[bytes, _Lane] = {}
        self._all: set[_Lane] = set()

    def lane(self) -> _Lane:
        return _Lane(self)

    def opened(self, lane: _Lane) -> None:
        self._all.add(lane)

    def joined(self, lane: _Lane) -> None:
        self._lanes[lane.peer] = lane

    def closed(self, lane: _Lane) -> None:
        self._all.discard(lane)
        if self._lanes.get(lane.peer) is lane:
            del self._lanes[lane.peer]
            self._lost(lane.peer)

    def close(self) -> None:
        self._lanes.clear()
        for lane in list(self._all):
            lane.abort()


class _Lane(asyncio.Protocol):
    """peer: who sends, as on its other link; b"" until it has said so."""

    def __init__(self, door: OutputDoor) -> None:
        self.peer = b""
        self._door = door
        self._splitter = FrameSplitter(MAX_OUTPUT_BYTES)
        self._transport: asyncio.Transport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._door.opened(self)

    def connection_lost(self, error: Exception | None) -> None:
        self._door.closed(self)

    def abort(self) -> None:
        self._transport.abort()

    def data_received(self, data: bytes) -> None:
        """Whoever may open the socket can send here: what is no Output ends the connection."""
        try:
            for payload in self._splitter.feed(data):
                self._take(payload)
        except (ValueError, RecursionError) as error:
            _log.warning("%r sent what is no output: %s", self.peer, str(error)[:200])
            self._transport.abort()

    def _take(self, payload: bytes) -> None:
        if self.peer:
            self._door.receive(self.peer, decode_output(payload))
            return
        joined = decode_joined(payload)
        self.peer = detokenizer_identity(joined.group, joined.incarnation).encode()
        self._door.joined(self)
