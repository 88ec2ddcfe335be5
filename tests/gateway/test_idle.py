"""Connections on which nothing is asked end in time, whatever else comes over them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from albireo.gateway import server as gateway_server
from albireo.gateway.link import Ask

from .played import PlayedLink, parrot
from .serving import Bare, Serving, wait_for

KEEP_ALIVE_S = 0.4
HEAD_S = 0.2
_HEALTH = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
_NOTHING_THERE = b"POST /v1/nope HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setattr(gateway_server, "KEEP_ALIVE_S", KEEP_ALIVE_S)
    running = Serving(PlayedLink(), tmp_path / "s")
    yield running
    running.stop()


@pytest.mark.parametrize(
    ("asked", "then"),
    [
        (_HEALTH, b""),
        (_HEALTH, b"\r\n"),
        (_NOTHING_THERE % 10, b"0123456789"),
        (_NOTHING_THERE % 1_000_000, b"0123456789"),
    ],
    ids=["nothing", "line end", "late body", "part of a body"],
)
def test_an_idle_connection_ends(serving: Serving, asked: bytes, then: bytes) -> None:
    bare = Bare(serving)
    bare.socket.sendall(asked)
    bare.until(b"\r\n\r\n")
    bare.socket.sendall(then)
    bare.to_the_end()
    wait_for(lambda: serving.connections == 0)


def test_a_head_that_comes_slowly_is_no_idle_connection(serving: Serving) -> None:
    """Also where it has begun before the response to the last request was complete."""
    bare = Bare(serving)
    half = len(_HEALTH) // 2
    bare.socket.sendall(_HEALTH + _HEALTH[:half])
    for _ in range(3):
        assert bare.until(b"\r\n\r\n").startswith(b"HTTP/1.1 200")
        time.sleep(KEEP_ALIVE_S * 0.7)
        bare.socket.sendall(_HEALTH[half:] + _HEALTH[:half])
    bare.close()


@pytest.mark.parametrize("before", [1, 2])
def test_a_head_that_begins_behind_a_request_does_not_end_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: int
) -> None:
    """It has its time from the last answer on: nothing more is read before that."""

    async def late(link: PlayedLink, number: int, ask: Ask, on_reply: Any) -> None:
        await asyncio.sleep(3.5 * HEAD_S)
        await parrot(link, number, ask, on_reply)

    monkeypatch.setattr(gateway_server, "HEAD_TIMEOUT_S", HEAD_S)
    running = Serving(PlayedLink(late), tmp_path / "s")
    try:
        bare = Bare(running)
        body = b'{"prompt": "a"}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n"
        bare.socket.sendall((head % len(body) + body) * before + _HEALTH[:9])
        for _ in range(before):
            bare.until(b"HTTP/1.1 200")
            bare.until(b'"total_tokens"')
        answered = time.monotonic()
        bare.to_the_end()
        assert time.monotonic() - answered > HEAD_S / 2
    finally:
        running.stop()
