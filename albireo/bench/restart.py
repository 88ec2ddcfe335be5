"""`albireo bench restart`: a worker is killed while its group answers; how long until all goes on.

Streams decode on a node of one group.  One of its workers gets SIGKILL.  From that
moment: until the group's processes are ready again, which is what loading the model
takes (the workers' phases say what of it), and until each stream has its next token,
for which prompts and tokens so far are computed again.  A node of its own for each
round: who dies often starts later.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
import time
from typing import Any

import uvloop

from albireo.client import AsyncClient
from albireo.node.options import NodeOptions
from albireo.node.runtime_dir import read_facts

from .machine import machine
from .nodes import BenchError, running_node, workers_phases
from .step import with_model
from .streams import TimedStream, run_streams

_TOKENS_BEFORE = 16
_POLL_S = 0.01
_GIVE_UP_S = 600.0


def bench_restart(
    shape: str | None, options: NodeOptions, streams: int, input_len: int, rounds: int
) -> dict[str, Any]:
    """shape: with random weights; None: the model of `options`.

    Raises BenchError when the node does not start, or a stream does not go on.
    """
    if len(options.groups) != 1:
        raise BenchError("--groups: where others are up, streams go on there; give 1xT")
    found: list[dict[str, Any]] = []
    with with_model(shape, options, streams, input_len + 4 * _TOKENS_BEFORE) as options:
        for _ in range(rounds):
            with running_node(options) as node:
                found.append(uvloop.run(_measure(node, streams, input_len)))
    model = found[0]["model"]
    return {
        "bench": "restart",
        "machine": machine(),
        "model": model["id"],
        "device": model["device"],
        "dtype": model["dtype"],
        "groups": list(options.groups),
        "streams": streams,
        "input_len": input_len,
        "ready_s": [each["ready_s"] for each in found],
        "pause_s": [each["pause_s"] for each in found],
        "workers_phases_s": [each["workers_phases_s"] for each in found],
    }


async def _measure(node: str, streams: int, input_len: int) -> dict[str, Any]:
    rng = random.Random(0)
    running: list[TimedStream] = []
    async with await AsyncClient.connect(node=node) as client:
        tree = await client.status()
        task = asyncio.create_task(
            run_streams(client, rng, streams, input_len, 4 * _TOKENS_BEFORE, "greedy", running)
        )
        while not task.done() and (
            len(running) < streams or min(each.tokens for each in running) < _TOKENS_BEFORE
        ):
            await asyncio.sleep(0.001)
        killed = time.perf_counter()
        pid = _workers(tree)[0]
        os.kill(pid, signal.SIGKILL)
        while True:
            now = await client.status()
            if now["groups"][0]["state"] == "ready" and _workers(now) and pid not in _workers(now):
                break
            if time.perf_counter() - killed > _GIVE_UP_S:
                raise BenchError(f"the group was not ready again within {_GIVE_UP_S:g} s")
            await asyncio.sleep(_POLL_S)
        ready = time.perf_counter()
        facts = read_facts(node) or {}
        await task
    pauses = [
        min((at for at, _ in each.arrivals if at > ready), default=ready) - killed
        for each in running
    ]
    return {
        "model": tree["model"],
        "ready_s": round(ready - killed, 3),
        "pause_s": round(statistics.median(pauses), 3),
        "workers_phases_s": workers_phases(facts),
    }


def _workers(tree: dict[str, Any]) -> list[int]:
    """Their process ids, of the group's ready ones."""
    return [
        actor["pid"]
        for actor in tree["actors"]
        if actor["name"].startswith("g0.worker") and actor["state"] == "ready"
    ]
