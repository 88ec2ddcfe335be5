"""python -m tests.chaos.readmission [--kills 50] [--streams 3] [--model demo]

A worker is killed again and again while a second group is up.  Of its streams: how
long from the detection until the other group has them, and what their clients see,
of which the most is the prompt and the tokens so far being computed again.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from typing import Any

import msgspec

from albireo.client import AsyncClient
from albireo.node.owned import OwnedNode

from .faults import harm
from .node import Health, model_path, options

LIMIT_MS = 300.0
_TOKENS = 400
_PROMPT = 100
_KILL_AFTER = (2, 20)
_WHOLE_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--streams", type=int, default=3, help="in flight at each")
    parser.add_argument("--model", default="demo", metavar="DIR|FILE.gguf|demo")
    given = parser.parse_args()
    # The other group has room for all.
    chosen = msgspec.structs.replace(
        options(model_path(given.model)),
        max_num_seqs=2 * given.streams,
        max_num_batched_tokens=64,
    )
    node = OwnedNode(chosen)
    try:
        told, pauses = asyncio.run(measure(node.name, given.kills, given.streams))
    finally:
        node.stop()
    print(f"{given.kills} kills of a worker, {told['count']} streams went on elsewhere")
    print(
        f"from detection to readmission: P50 {told['p50']:.1f} ms, P99 {told['p99']:.1f} ms, "
        f"most {told['max']:.1f} ms (limit {LIMIT_MS:g} ms at P99)"
    )
    pauses.sort()
    print(
        f"pause of the client, from the last token of the dead group to the first of the other "
        f"one, {_PROMPT} to {_PROMPT + _KILL_AFTER[1]} tokens computed again among it: "
        f"P50 {statistics.median(pauses):.1f} ms, P99 {pauses[int(len(pauses) * 0.99)]:.1f} ms"
    )
    sys.exit(1 if told["p99"] >= LIMIT_MS or told["count"] < given.kills else 0)


async def measure(node: str, kills: int, streams: int) -> tuple[dict[str, Any], list[float]]:
    """readmission_ms of the node's status, and the pauses in ms."""
    pauses: list[float] = []
    rng = random.Random(1)
    health = Health(node)
    async with await AsyncClient.connect(node=node) as client:
        for number in range(kills):
            if await health.whole(_WHOLE_S) is None:
                raise TimeoutError(f"the node was not whole within {_WHOLE_S:g} s")
            times: list[list[float]] = [[] for _ in range(streams)]
            tasks = [asyncio.create_task(_stream(client, rng, each)) for each in times]
            enough = rng.randrange(*_KILL_AFTER)
            while min(map(len, times)) < enough:
                await asyncio.sleep(0.002)
            tree = await client.status()
            group = max(tree["groups"], key=lambda each: each["in_flight"])["group"]
            (pid,) = [a["pid"] for a in tree["actors"] if a["name"] == f"g{group}.worker0"]
            at = time.monotonic()
            harm(pid, "kill")
            failed_over = tree["requests"]["failed_over"]
            while (await client.status())["requests"]["failed_over"] == failed_over:
                await asyncio.sleep(0.02)
            moved = min(len(tasks), tree["groups"][group]["in_flight"])
            before = [len([t for t in each if t <= at]) for each in times]
            while any(len(t) < n + 8 for t, n in zip(times, before, strict=True)):
                await asyncio.sleep(0.01)
            longest = sorted(_longest_gap(each, at) for each in times)
            pauses += longest[-moved:]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            print(f"\r{number + 1} of {kills}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        await health.close()
        return (await client.status())["readmission_ms"], pauses


async def _stream(client: AsyncClient, rng: random.Random, times: list[float]) -> None:
    prompt = [rng.randrange(300, 20_000) for _ in range(_PROMPT)]
    async with client.stream(prompt, max_tokens=_TOKENS, ignore_eos=True) as stream:
        async for delta in stream:
            times += [time.monotonic()] * len(delta.token_ids)


def _longest_gap(times: list[float], at: float) -> float:
    """Between two tokens around and behind a moment, in ms."""
    behind = [t for t in times if t > at]
    last = max((t for t in times if t <= at), default=at)
    return max(b - a for a, b in zip([last, *behind], behind, strict=False)) * 1e3


if __name__ == "__main__":
    main()
