"""The same messages over the sockets of a real node, which must be as it was afterwards."""

from __future__ import annotations

import contextlib
import random
import socket
import time
from collections import Counter

import msgspec

from ..endurance.node import KEY, Running, running
from ..endurance.watch import Watch
from .mutate import client_payloads, frames, http_bodies, tear

MOST_BYTES = 4 << 20
_OF_A_CONNECTION = 50
_WAIT_S = 0.02
_REST_S = 30.0
_HELLO = msgspec.msgpack.encode({"type": "hello", "protocol": 1, "api_key": KEY})


def over_sockets(messages: int, rng: random.Random, counts: Counter[str]) -> list[str]:
    """Sends so many, half of them over HTTP; what was wrong."""
    with running("fuzz") as node:
        pids = node.pids()
        watch = Watch(pids)
        _send(node, messages // 3, rng, counts)  # warms up
        for _ in range(10):
            _send(node, messages // 15, rng, counts)
            faults = _rest(node)
            watch.sample()
        faults += watch.faults(MOST_BYTES, 2)
        if node.pids() != pids:
            faults.append("processes have ended")
        print(watch.table(10 * (messages // 15)))
    return faults


def _send(node: Running, messages: int, rng: random.Random, counts: Counter[str]) -> None:
    payloads, bodies = client_payloads(rng), http_bodies(rng)
    sent = 0
    while sent < messages:
        count = rng.randrange(1, _OF_A_CONNECTION)
        if rng.getrandbits(1):
            data = b"".join(frames(rng, payloads.draw()) for _ in range(count))
            if rng.random() < 0.9:
                data = len(_HELLO).to_bytes(4, "little") + _HELLO + data
            _strike(socket.AF_UNIX, node.socket, data)
            counts["over the Unix socket"] += count
        else:
            requests = [_request(rng, *next(bodies)) for _ in range(count)]
            answer = _strike(socket.AF_INET, node.http, b"".join(requests))
            assert b"HTTP/1.1 500" not in answer, (requests, answer)
            counts["over HTTP"] += count
        sent += count


def _request(rng: random.Random, path: str, body: bytes) -> bytes:
    head = (
        b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n"
        % (path.encode(), KEY.encode(), len(body))
    )
    return (tear(rng, head, body) if rng.getrandbits(3) == 0 else head) + body


def _strike(family: int, where: object, data: bytes) -> bytes:
    """What came within a moment."""
    got = b""
    with socket.socket(family) as connection, contextlib.suppress(OSError):
        connection.settimeout(_WAIT_S)
        connection.connect(where)  # type: ignore[arg-type]
        connection.sendall(data)
        while piece := connection.recv(1 << 16):
            got = got[-4096:] + piece
    return got


def _rest(node: Running) -> list[str]:
    deadline = time.monotonic() + _REST_S
    while (left := node.held()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return [f"at rest: {count} {what}" for what, count in left.items()]
