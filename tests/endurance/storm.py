"""python -m tests.endurance.storm [--clients 1000] [--rounds 10] [--seed N]

Clients that connect, ask and vanish at random moments, over the Unix socket,
TLS and HTTP.  After each round nothing of them may be left: no request, KV block,
connection, open file or memory.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import secrets
import socket
import ssl
import struct
import sys
import time
from collections import Counter
from typing import Any

import msgspec

from albireo.ipc.open_files import raise_open_files

from .node import KEY, Running, running
from .watch import Watch

MOST_BYTES = 3 << 20
MOST_FDS = 0
_SPREAD_S = 3.0
_REST_S = 30.0
_SETTLE_S = 2.0
_GIVE_UP_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warm-up", type=int, default=10, help="rounds before those")
    parser.add_argument("--seed", type=int, help="of an earlier run, to repeat it")
    given = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    faults = storm(given.clients, given.rounds, given.warm_up, seed)
    print(f"{len(faults)} violations, seed {seed}")
    sys.exit(1 if faults else 0)


def storm(clients: int, rounds: int, warm_up: int, seed: int) -> list[str]:
    """Runs it; what was wrong.  Until the end of the warm-up memory may grow: to what so many
    clients at once need, wherever they meet."""
    raise_open_files()
    rng = random.Random(seed)
    counts: Counter[str] = Counter()
    faults: list[str] = []
    with running("storm") as node:
        pids = node.pids()
        watch = Watch(pids)
        for number in range(warm_up + rounds):
            began = time.monotonic()
            asyncio.run(_round(node, clients, rng, counts))
            took = time.monotonic() - began
            left = _rest(node)
            print(f"round {number}: {clients} clients in {took:.1f} s; left: {left or 'nothing'}")
            faults += [f"round {number}: {count} {what}" for what, count in left.items()]
            watch.sample(_SETTLE_S)
            if number + 1 == warm_up:
                watch = Watch(pids)
                watch.sample()
        faults += watch.faults(MOST_BYTES, MOST_FDS)
        if node.pids() != pids:
            faults.append(f"processes have ended: {pids} {node.pids()}")
        if rounds:
            print(watch.table(clients * rounds))
    for what, count in sorted(counts.items()):
        print(f"{what:40} {count}")
    for fault in faults:
        print(f"WRONG: {fault}")
    return faults


def _rest(node: Running) -> dict[str, int]:
    """What is still held when there was time enough to let it go."""
    deadline = time.monotonic() + _REST_S
    while (left := node.held()) and time.monotonic() < deadline:
        time.sleep(0.1)
    return left


async def _round(node: Running, clients: int, rng: random.Random, counts: Counter[str]) -> None:
    trusting = ssl.create_default_context(cafile=node.ca)
    ways = [rng.choice(("socket", "socket", "http", "http", "tls")) for _ in range(clients)]
    lives = [_Life(node, way, trusting, random.Random(rng.getrandbits(64))) for way in ways]
    async with asyncio.timeout(_GIVE_UP_S * 3):
        for life, how in zip(lives, await asyncio.gather(*(x.live() for x in lives)), strict=True):
            counts[f"{life.way}: {how}"] += 1


class _Life:
    """One client from its connection to the moment at which it vanishes."""

    def __init__(
        self, node: Running, way: str, trusting: ssl.SSLContext, rng: random.Random
    ) -> None:
        self.way = way
        self._node = node
        self._trusting = trusting
        self._rng = rng

    async def live(self) -> str:
        """How far it came."""
        rng = self._rng
        await asyncio.sleep(rng.random() * _SPREAD_S)
        try:
            async with asyncio.timeout(_GIVE_UP_S):
                reader, writer = await self._connect()
        except (OSError, TimeoutError) as error:
            return f"not connected ({type(error).__name__})"
        try:
            return await self._ask(reader, writer)
        except (OSError, EOFError, asyncio.IncompleteReadError) as error:
            return f"lost ({type(error).__name__})"
        finally:
            self._vanish(writer)

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self.way == "socket":
            return await asyncio.open_unix_connection(self._node.socket)
        if self.way == "http":
            return await asyncio.open_connection(*self._node.http)
        host, _, port = self._node.listen.removeprefix("tls://").rpartition(":")
        return await asyncio.open_connection(host, int(port), ssl=self._trusting)

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> str:
        rng = self._rng
        data = self._http_request() if self.way == "http" else self._frames()
        moment = rng.randrange(5)
        if moment == 0:
            return "vanished before a word"
        if moment == 1:
            writer.write(data[: rng.randrange(1, len(data))])
            await asyncio.sleep(rng.random() * 0.1)
            return "vanished within a message"
        writer.write(data)
        if moment == 2:
            await asyncio.sleep(rng.random() * 0.2)
            return "vanished with a request in flight"
        if moment == 3:
            await reader.read(rng.randrange(1, 400))
            return "vanished while tokens came"
        if moment == 4 and rng.random() < 0.3:
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            await asyncio.sleep(rng.random())
            return "vanished without reading"
        async with asyncio.timeout(_GIVE_UP_S):
            return await self._to_the_end(reader)

    async def _to_the_end(self, reader: asyncio.StreamReader) -> str:
        end = b"[DONE]" if self.way == "http" else b"length"
        seen = b""
        while end not in seen:
            data = await reader.read(1 << 16)
            if not data:
                raise EOFError
            seen = seen[-64:] + data
        return "had its answer"

    def _params(self) -> dict[str, Any]:
        return {"max_tokens": self._rng.randrange(1, 60), "ignore_eos": True}

    def _prompt(self) -> list[int]:
        return [self._rng.randrange(256) for _ in range(self._rng.randrange(1, 100))]

    def _frames(self) -> bytes:
        ask = {"type": "generate", "id": 1, "prompt_ids": self._prompt(), "params": self._params()}
        messages = ({"type": "hello", "protocol": 1, "api_key": KEY}, ask)
        payloads = [msgspec.msgpack.encode(each) for each in messages]
        return b"".join(struct.pack("<I", len(each)) + each for each in payloads)

    def _http_request(self) -> bytes:
        body = msgspec.json.encode({"prompt": self._prompt(), "stream": True, **self._params()})
        return (
            b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            b"Authorization: Bearer %s\r\nContent-Length: %d\r\n\r\n%s"
            % (KEY.encode(), len(body), body)
        )

    def _vanish(self, writer: asyncio.StreamWriter) -> None:
        """In order, or with a reset."""
        if self._rng.random() < 0.5 and self.way != "socket":
            with contextlib.suppress(OSError, AttributeError):
                raw = writer.get_extra_info("socket")
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()


if __name__ == "__main__":
    main()
