"""`albireo bench flood`: what one client feels while another floods the node with requests.

On the `sim` device, whose steps take a constant time: all that changes is who
waits for whom.  The quiet client sends a request, waits for its end and for the
rest of a second, and sends the next; first alone, then beside the flood.
"""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import Any

import msgspec
import uvloop

from albireo.client import AlbireoError, AsyncClient
from albireo.node.options import NodeOptions

from .machine import machine
from .nodes import BenchError, running_node
from .streams import random_prompt

_INPUT_LEN = 64
_OUTPUT_LEN = 16


def bench_flood(
    options: NodeOptions, requests: int, output_len: int, samples: int, interval_s: float = 1.0
) -> dict[str, Any]:
    """requests: of the flood, each of 64 tokens that asks for output_len.  samples: of the other.

    Raises BenchError when the node does not start, does not take the whole flood, or is done with
    it before the samples end.
    """
    queued = max(options.max_num_queued_reqs, requests + 1)
    options = msgspec.structs.replace(options, device="sim", max_num_queued_reqs=queued)
    with running_node(options) as node:
        measured = uvloop.run(_measure(node, requests, output_len, samples, interval_s))
    return {
        "bench": "flood",
        "machine": machine(),
        "groups": list(options.groups),
        "step_ms": options.sim_step_ms,
        "max_num_seqs": options.max_num_seqs,
        "flood": {"requests": requests, "input_len": _INPUT_LEN, "output_len": output_len},
        **measured,
    }


async def _measure(
    node: str, requests: int, output_len: int, samples: int, interval_s: float
) -> dict[str, Any]:
    rng = random.Random(0)
    async with (
        await AsyncClient.connect(node=node) as flood,
        await AsyncClient.connect(node=node) as client,
    ):
        await _ttfts(client, rng, 1, 0.0)
        quiet = await _ttfts(client, rng, samples, interval_s)
        flooding = [
            asyncio.create_task(
                flood.generate(
                    random_prompt(flood, rng, _INPUT_LEN), max_tokens=output_len, ignore_eos=True
                )
            )
            for _ in range(requests)
        ]
        try:
            await asyncio.sleep(interval_s / 2)
            beside = await _ttfts(client, rng, samples, interval_s)
            left = sum(not task.done() for task in flooding)
        finally:
            for task in flooding:
                task.cancel()
            ended = await asyncio.gather(*flooding, return_exceptions=True)
    for each in ended:
        if isinstance(each, AlbireoError):
            raise BenchError(f"a request of the flood failed: {each}")
    if not left:
        raise BenchError(
            f"the {requests} requests of the flood were done before the {samples} samples "
            "were: send more of them, or let them be longer"
        )
    alone = statistics.median(quiet)
    return {
        "samples": samples,
        "left_of_the_flood": left,
        "ttft_ms_quiet": [round(ms, 2) for ms in quiet],
        "ttft_ms_beside_the_flood": [round(ms, 2) for ms in beside],
        "times_longer_median": round(statistics.median(beside) / alone, 2),
        "times_longer_worst": round(max(beside) / alone, 2),
    }


async def _ttfts(
    client: AsyncClient, rng: random.Random, count: int, interval_s: float
) -> list[float]:
    """Time to the first token of so many requests, one an interval, in ms."""
    taken: list[float] = []
    for _ in range(count):
        prompt = random_prompt(client, rng, _INPUT_LEN)
        start = time.perf_counter()
        first = 0.0
        async for delta in client.stream(prompt, max_tokens=_OUTPUT_LEN, ignore_eos=True):
            if delta.token_ids and not first:
                first = time.perf_counter()
        taken.append((first - start) * 1e3)
        await asyncio.sleep(max(0.0, interval_s - (time.perf_counter() - start)))
    return taken
