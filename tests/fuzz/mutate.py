"""What is nearly right: maps with other values, and bytes that were changed.

All of it from one random.Random, so that a seed repeats a run.
"""

from __future__ import annotations

import random
import struct
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from .seeds import CLIENT, HTTP, OLD_HELLOS

_TEXTS = ("", "a", "\0", "é€😀", "x" * 300, "hello", "user", "\ud7ff", "{}", "null", "[" * 50)
_NUMBERS = (
    0, 1, -1, 2, 127, 128, 255, 256, 65_535, 2**31 - 1, 2**31, -(2**31), 2**32, 2**53, 2**63 - 1,
    -(2**63), 2**64 - 1, 0.0, -0.0, 0.5, 1.0, 1e308, 5e-324, float("inf"), float("-inf"),
    float("nan"),
)  # fmt: skip
_POOL_SIZE = 4096
_RUN = 24


def value(rng: random.Random, depth: int = 0) -> Any:
    """Any value that msgpack and JSON can carry."""
    kind = rng.randrange(9 if depth < 3 else 6)
    if kind == 0:
        return None
    if kind == 1:
        return rng.random() < 0.5
    if kind in (2, 3):
        return rng.choice(_NUMBERS)
    if kind in (4, 5):
        return rng.choice(_TEXTS)
    if kind == 6:
        return [value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 7:
        return {rng.choice(_TEXTS[:6]): value(rng, depth + 1) for _ in range(rng.randrange(4))}
    return [rng.choice(_NUMBERS)] * rng.choice((1, 17, 300))


def change(rng: random.Random, message: dict[str, Any]) -> dict[str, Any]:
    """A copy with some fields, at any depth, replaced, removed or added."""
    changed = msgspec.msgpack.decode(msgspec.msgpack.encode(message))
    for _ in range(rng.choice((0, 0, 1, 1, 2, 3))):
        at: Any = changed
        while True:
            inner = at.values() if isinstance(at, dict) else at
            deeper = [each for each in inner if isinstance(each, dict | list) and each]
            if not deeper or rng.random() < 0.5:
                break
            at = rng.choice(deeper)
        if isinstance(at, dict):
            name = rng.choice([*at, "params", "extra"])
            if rng.random() < 0.2:
                at.pop(name, None)
            else:
                at[name] = value(rng)
        elif at:
            at[rng.randrange(len(at))] = value(rng)
    return changed


def tear(rng: random.Random, data: bytes, other: bytes) -> bytes:
    """The same bytes with a few changed, lost, repeated, put in, or from elsewhere."""
    torn = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 4))):
        place = rng.randrange(len(torn) + 1)
        kind = rng.randrange(7)
        if kind == 0 and torn:
            torn[place - 1] ^= 1 << rng.randrange(8)
        elif kind == 1 and torn:
            torn[place - 1] = rng.randrange(256)
        elif kind == 2:
            del torn[place:]
        elif kind == 3:
            del torn[place : place + rng.randrange(1, _RUN)]
        elif kind == 4:
            torn[place:place] = rng.randbytes(rng.randrange(1, _RUN))
        elif kind == 5:
            torn[place:] = other[rng.randrange(len(other) + 1) :]
        else:
            torn[place:place] = torn[max(0, place - _RUN) : place]
    return bytes(torn)


class Pool:
    """Encoded variants of the seeds, made anew from time to time: a draw costs little.

    make: gives one variant.
    """

    def __init__(self, rng: random.Random, make: Callable[[], bytes]) -> None:
        self._rng = rng
        self._make = make
        self._made: list[bytes] = []
        self._drawn = 0

    def draw(self) -> bytes:
        """One variant, every fourth time torn besides."""
        if self._drawn >= 8 * len(self._made):
            self._made = [self._make() for _ in range(_POOL_SIZE)]
            self._drawn = 0
        self._drawn += 1
        rng = self._rng
        chosen = self._made[rng.getrandbits(12)]
        return chosen if rng.getrandbits(2) else tear(rng, chosen, self._made[rng.getrandbits(12)])


def client_payloads(rng: random.Random) -> Pool:
    """msgpack of client messages, right and wrong, of old protocols, and noise."""

    def make() -> bytes:
        kind = rng.random()
        if kind < 0.02:
            return rng.randbytes(rng.randrange(200))
        if kind < 0.04:
            return bytes([rng.choice(b"\x81\x91")]) * rng.choice((50, 5000))
        seed = rng.choice(OLD_HELLOS if kind < 0.08 else CLIENT)
        if "id" in seed and rng.getrandbits(2):
            seed = seed | {"id": rng.getrandbits(31)}
        try:
            return msgspec.msgpack.encode(change(rng, seed))
        except (OverflowError, UnicodeEncodeError):
            return msgspec.msgpack.encode(seed)

    return Pool(rng, make)


def frames(rng: random.Random, payload: bytes) -> bytes:
    """A payload as a frame: nearly always with its length."""
    length = len(payload)
    if rng.getrandbits(7) == 0:
        length = rng.choice((0, length + 1, max(0, length - 1), 8 << 20, (8 << 20) + 1, 2**32 - 1))
    return struct.pack("<I", length) + payload


def http_bodies(rng: random.Random) -> Iterator[tuple[str, bytes]]:
    """Paths and JSON bodies, right and wrong.  Answers are kept few: it is not they that are
    tried."""
    pools = []
    for path, body in HTTP:

        def make(body: dict[str, Any] = body) -> bytes:
            kind = rng.random()
            if kind < 0.02:
                return rng.randbytes(rng.randrange(200))
            if kind < 0.04:
                return rng.choice((b"[", b'{"a":')) * rng.choice((50, 5000))
            try:
                return msgspec.json.encode(change(rng, body))
            except (OverflowError, UnicodeEncodeError):
                return msgspec.json.encode(body)

        pools.append((path, Pool(rng, make)))
    while True:
        path, pool = pools[rng.randrange(len(pools))]
        yield path, pool.draw()
