"""python -m tests.endurance.soak [--minutes 15] [--per-second 96] [--seed N]

A day's requests in a quarter of an hour: 96 a second for 15 minutes are those of a node
that has one a second for 24 hours.  Over the Unix socket, TLS and HTTP; prompts of all
lengths as ids, texts and conversations; streams, cancels, clients that leave, errors.
Memory and open files of every process of the node must be flat (see watch.py).
"""

from __future__ import annotations

import argparse
import asyncio
import random
import secrets
import sys
import time
from collections import Counter
from typing import Any

import msgspec

from albireo.client import AlbireoError, AsyncClient

from .node import KEY, Running, running
from .watch import Watch

MOST_BYTES = 4 << 20
MOST_FDS = 4
_WARM_UP = 0.25
_SAMPLE_S = 5.0
_CLIENT_LIVES = 500
_GIVE_UP_S = 60.0
_CLIENTS = 6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--per-second", type=float, default=96.0)
    parser.add_argument("--seed", type=int, help="of an earlier run, to repeat it")
    given = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    with running("soak", sim_step_ms=5.0) as node:
        faults = asyncio.run(soak(node, given.minutes * 60, given.per_second, seed))
    print(f"{len(faults)} violations, seed {seed}")
    sys.exit(1 if faults else 0)


async def soak(node: Running, seconds: float, rate: float, seed: int) -> list[str]:
    """Runs it; what was wrong."""
    pids = await asyncio.to_thread(node.pids)
    watch = Watch(pids)
    load = _Load(node, random.Random(seed))
    began = time.monotonic()
    warm = began + seconds * _WARM_UP
    asking = asyncio.create_task(load.run(began, seconds, rate))
    before = 0
    while not asking.done():
        await asyncio.wait((asking,), timeout=_SAMPLE_S)
        if time.monotonic() >= warm:
            before = before or load.ended
            await asyncio.to_thread(watch.sample)
    await asking
    took = time.monotonic() - began
    await asyncio.sleep(2)
    left = await asyncio.to_thread(node.held)
    print(f"{load.ended} requests in {took:.0f} s, {load.ended / took:.1f} a second")
    for what, count in sorted(load.counts.items()):
        print(f"  {what:40} {count}")
    print(
        f"in the last {watch.series['router'].times[-1] - watch.series['router'].times[0]:.0f} s:"
    )
    print(watch.table(load.ended - before))
    faults = watch.faults(MOST_BYTES, MOST_FDS) + load.faults[:20]
    faults += [f"at rest: {count} {what}" for what, count in left.items()]
    if await asyncio.to_thread(node.pids) != pids:
        faults.append("processes have ended")
    if load.ended < 0.9 * seconds * rate:
        faults.append(f"only {load.ended} of {seconds * rate:.0f} requests could be made")
    for fault in faults:
        print(f"WRONG: {fault}")
    return faults


class _Load:
    """Requests at a steady rate.  ended: how many have; counts: how; faults: of those that ended
    as they should not."""

    def __init__(self, node: Running, rng: random.Random) -> None:
        self.ended = 0
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self._node = node
        self._rng = rng
        self._clients: list[AsyncClient | None] = [None] * _CLIENTS
        self._opening = [asyncio.Lock() for _ in range(_CLIENTS)]

    async def run(self, began: float, seconds: float, rate: float) -> None:
        async with asyncio.TaskGroup() as tasks:  # what `_one` does not expect ends the run
            for number in range(int(seconds * rate)):
                await asyncio.sleep(began + number / rate - time.monotonic())
                if time.monotonic() > began + seconds:
                    break
                tasks.create_task(self._one(random.Random(self._rng.getrandbits(64))))
        for client in self._clients:
            if client is not None:
                await client.close()

    async def _one(self, rng: random.Random) -> None:
        kind = rng.choices(
            ("generate", "text", "chat", "stream", "cancel", "refused", "tokenize", "http",
             "http stream", "http leaves"),
            (20, 10, 10, 15, 5, 5, 5, 10, 15, 5),
        )[0]  # fmt: skip
        try:
            async with asyncio.timeout(_GIVE_UP_S):
                if kind.startswith("http"):
                    await self._http(kind, rng)
                else:
                    await self._ask(kind, await self._client(rng), rng)
            self.counts[kind] += 1
        except (
            AlbireoError,
            OSError,
            EOFError,
            TimeoutError,
            asyncio.IncompleteReadError,
        ) as error:
            self.counts[f"{kind} failed"] += 1
            self.faults.append(f"{kind}: {type(error).__name__}: {error}")
        self.ended += 1

    async def _client(self, rng: random.Random) -> AsyncClient:
        """One of a few, over the Unix socket or TLS; each is replaced from time to time."""
        place = rng.randrange(_CLIENTS)
        async with self._opening[place]:
            client = self._clients[place]
            if client is not None and rng.randrange(_CLIENT_LIVES):
                return client
            if client is None or not client.in_flight:
                if client is not None:
                    await client.close()
                if place % 2:
                    client = await AsyncClient.connect(
                        self._node.listen, api_key=KEY, ca=self._node.ca
                    )
                else:
                    client = await AsyncClient.connect(node=self._node.name)
                self._clients[place] = client
            return client

    async def _ask(self, kind: str, client: AsyncClient, rng: random.Random) -> None:
        most = rng.randrange(1, 33)
        ids = [rng.randrange(256) for _ in range(rng.choice((1, 8, 40, 200)))]
        if kind == "generate":
            answer = await client.generate(ids, max_tokens=most, ignore_eos=True, seed=1)
            _require(len(answer.token_ids) == most, answer)
        elif kind == "text":
            answer = await client.generate("x" * len(ids), max_tokens=most, ignore_eos=True, n=2)
            _require(len(answer.choices) == 2, answer)
        elif kind == "chat":
            said = [{"role": "user", "content": "y" * len(ids)}]
            _require((await client.chat(said, max_tokens=most)).usage.completion_tokens > 0, said)
        elif kind == "tokenize":
            _require(len(await client.tokenize("z" * len(ids))) >= len(ids), ids)
        elif kind == "refused":
            try:
                await client.generate(ids, max_tokens=100_000)
            except AlbireoError:
                return
            raise EOFError("max_tokens beyond the context was taken")
        else:
            stream = client.stream(ids, max_tokens=most, ignore_eos=True, logprobs=1)
            async for delta in stream:
                if kind == "cancel":
                    await stream.aclose()
                    return
                _require(delta.logprobs is not None, delta)

    async def _http(self, kind: str, rng: random.Random) -> None:
        reader, writer = await asyncio.open_connection(*self._node.http)
        try:
            body = msgspec.json.encode(
                {"prompt": "x" * rng.randrange(1, 100), "max_tokens": rng.randrange(1, 33),
                 "ignore_eos": True, "stream": kind != "http"}
            )  # fmt: skip
            writer.write(
                b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
                b"Content-Type: application/json\r\nAuthorization: Bearer %s\r\n"
                b"Content-Length: %d\r\n\r\n%s" % (KEY.encode(), len(body), body)
            )
            if kind == "http leaves":
                await reader.read(100)
                return
            answer = await reader.read()
            end = b'"finish_reason":"length"' if kind == "http" else b"data: [DONE]"
            _require(b" 200 " in answer[:20] and end in answer, answer)
        finally:
            writer.transport.abort()


def _require(true: bool, what: Any) -> None:
    if not true:
        raise EOFError(f"not as it should be: {str(what)[:300]}")


if __name__ == "__main__":
    main()
