"""A connection that is over goes at once: nothing of it waits for the garbage collector."""

from __future__ import annotations

import gc
import socket
import struct
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest

from albireo.gateway import server

from .played import PlayedLink
from .serving import Bare, Serving, wait_for

BODY = b'{"prompt":"abc","max_tokens":30,"stream":true}'


def answered(bare: Bare) -> None:
    bare.post("/v1/completions", BODY)
    bare.until(b"[DONE]")


def answered_and_reset(bare: Bare) -> None:
    """The client ends it by a reset, as a system does where there is still something to read."""
    answered(bare)
    bare.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


def broken_off(bare: Bare) -> None:
    bare.post("/v1/completions", BODY)
    bare.until(b"data: ")


def half_a_head(bare: Bare) -> None:
    bare.socket.sendall(b"POST /v1/comp")


def half_a_body(bare: Bare) -> None:
    bare.socket.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nabc")


@pytest.mark.parametrize(
    "ask", [answered, answered_and_reset, broken_off, half_a_head, half_a_body]
)
def test_connections_leave_no_cycles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ask: Callable[[Bare], None]
) -> None:
    living: weakref.WeakSet[server.Connection] = weakref.WeakSet()

    class Counted(server.Connection):
        def connection_made(self, transport: object) -> None:
            living.add(self)
            super().connection_made(transport)  # type: ignore[arg-type]

    monkeypatch.setattr(server, "Connection", Counted)
    link = PlayedLink()
    serving = Serving(link, tmp_path / "s")
    gc.collect()
    gc.disable()
    try:
        for _ in range(5):
            bare = Bare(serving)
            ask(bare)
            wait_for(lambda: len(living) > 0)
            bare.close()
            wait_for(lambda: serving.connections == 0)
            link._tasks.clear()
        wait_for(lambda: not living)
    finally:
        gc.enable()
        serving.stop()
