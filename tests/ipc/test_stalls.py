"""Who is cut off while data waits for it, on a Unix socket (over TCP: the gateway's tests, and the
router's)."""

from __future__ import annotations

import asyncio
import socket

import pytest
import uvloop

from albireo.ipc.stalls import StallTimer


class _Held(asyncio.Protocol):
    def __init__(self, timeout_s: float) -> None:
        self.gone = asyncio.Event()
        self._timeout_s = timeout_s
        self._timer = StallTimer()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport: asyncio.Transport = transport  # type: ignore[assignment]
        self._transport.write(b"x" * 8_000_000)

    def pause_writing(self) -> None:
        self._timer.start(self._transport, self._timeout_s)

    def connection_lost(self, error: Exception | None) -> None:
        self._timer.stop()
        self.gone.set()


@pytest.mark.parametrize("new_loop", [uvloop.new_event_loop, asyncio.new_event_loop])
def test_who_reads_slowly_stays_until_it_stops(new_loop: object) -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        held = _Held(0.4)
        await loop.create_connection(lambda: held, sock=ours)
        for _ in range(25):
            assert await loop.sock_recv(theirs, 1 << 16)
            await asyncio.sleep(0.03)
        assert not held.gone.is_set()
        await asyncio.wait_for(held.gone.wait(), 5)
        theirs.close()

    with asyncio.Runner(loop_factory=new_loop) as runner:  # type: ignore[arg-type]
        runner.run(run())
