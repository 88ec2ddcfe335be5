"""python -m tests.fuzz [--messages 10000000] [--seed N] [--http 0.2] [--wire 20000]

Random and mutated messages in this process first, a share of them HTTP bodies; then some over
the sockets of a real node.  None may crash, hang or leak anything: memory and open files must not
grow.

    seeds.py     right messages, of which the others are made
    mutate.py    messages that are nearly right, and bytes that are nearly frames or JSON
    router.py    the router's sessions and the router behind them, in this process
    gateway.py   the gateway's application, in this process
    wire.py      a real node
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import secrets
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from ..endurance.watch import Watch
from .gateway import GatewayTarget
from .router import RouterTarget
from .wire import over_sockets

MOST_BYTES = 8 << 20
_SAMPLES = 40
_WARM_UP = 0.25


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000_000, help="in this process")
    parser.add_argument("--seed", type=int, help="of an earlier run, to repeat it")
    parser.add_argument("--http", type=float, default=0.2, help="share of HTTP bodies")
    parser.add_argument("--wire", type=int, default=20_000, help="over the sockets of a node")
    given = parser.parse_args()
    seed = secrets.randbelow(1 << 31) if given.seed is None else given.seed
    print(f"seed {seed}", flush=True)
    rng = random.Random(seed)
    faults, counts = asyncio.run(in_process(given.messages, given.http, rng, tell=True))
    if given.wire:
        faults += over_sockets(given.wire, rng, counts)
    for what, count in sorted(counts.items()):
        print(f"{what:40} {count}")
    for fault in faults:
        print(f"WRONG: {fault}")
    print(f"{len(faults)} violations, seed {seed}")
    sys.exit(1 if faults else 0)


async def in_process(
    messages: int, http: float, rng: random.Random, tell: bool = False
) -> tuple[list[str], Counter[str]]:
    """What was wrong, and what was answered.  AssertionError is for what a message has done."""
    watch = Watch({"fuzz": os.getpid()})
    began = time.monotonic()
    sent = bodies = samples = 0
    with tempfile.TemporaryDirectory(prefix="alb") as home:
        router, gateway = RouterTarget(Path(home), rng), GatewayTarget(rng)
        try:
            while sent < messages:
                if bodies < http * sent:
                    await gateway.request()
                    bodies += 1
                    sent += 1
                else:
                    sent += router.connection()
                    await asyncio.sleep(0)
                if sent >= messages * (_WARM_UP + (1 - _WARM_UP) * samples / _SAMPLES):
                    samples += 1
                    watch.sample()
                    if tell:
                        print(f"{sent:9d} messages, {time.monotonic() - began:.0f} s", flush=True)
        finally:
            router.close()
            gateway.close()
    if tell:
        took = time.monotonic() - began
        print(f"{sent - bodies} client messages and {bodies} HTTP bodies in {took:.0f} s")
        print(watch.table(int(sent * (1 - _WARM_UP))))
    counts = router.counts + gateway.counts
    return watch.faults(MOST_BYTES, 0), counts


if __name__ == "__main__":
    main()
