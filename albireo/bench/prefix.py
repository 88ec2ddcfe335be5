"""`albireo bench prefix`: the time to the first token of prompts with a common prefix, and without.

Prompts are sent one after the other to an idle node: each has `input_len`
tokens, of which the first share are common to all of its kind and the rest its
own.  The common part was computed once before; that request is not counted.
The two kinds take turns, so that what else the machine does falls on both.
"""

from __future__ import annotations

import asyncio
import random
import statistics
from typing import Any

import msgspec
import uvloop

from albireo.client import AsyncClient
from albireo.node.options import NodeOptions

from .machine import machine, spare_the_collector
from .nodes import BenchError, running_node
from .streams import random_prompt, time_prompts

_REPORT_S = 1.5


def bench_prefix(
    options: NodeOptions, input_len: int, shared: float, rounds: int
) -> dict[str, Any]:
    """shared: the share of a prompt that is common, 0 to 1.  rounds: prompts of each kind.

    Raises BenchError when the node does not start, or its cache is not used.
    """
    if not options.enable_prefix_caching:
        raise BenchError("the prefix cache is off: there is nothing to measure")
    options = msgspec.structs.replace(
        options, max_num_seqs=8, max_num_batched_tokens=input_len, max_model_len=input_len + 1
    )
    with running_node(options) as node:
        measured = uvloop.run(_measure(node, input_len, round(input_len * shared), rounds))
    return {
        "bench": "prefix",
        "machine": machine(),
        "groups": list(options.groups),
        "input_len": input_len,
        "shared_len": round(input_len * shared),
        "rounds": rounds,
        **measured,
    }


async def _measure(node: str, input_len: int, shared_len: int, rounds: int) -> dict[str, Any]:
    rng = random.Random(0)
    async with await AsyncClient.connect(node=node) as client:
        model = (await client.status())["model"]
        common = random_prompt(client, rng, shared_len)

        async def seconds(beginning: list[int]) -> float:
            spare_the_collector()
            prompt = beginning + random_prompt(client, rng, input_len - len(beginning))
            return await time_prompts(client, [prompt])

        for _ in range(2):  # the first one warms up, too
            await seconds([])
            await seconds(common)
        apart, together = [], []
        before = await _hits(client)
        for _ in range(rounds):
            apart.append(await seconds([]))
            together.append(await seconds(common))
        hits = await _hits(client) - before
    without, with_cache = statistics.median(apart), statistics.median(together)
    return {
        "model": model["id"],
        "device": model["device"],
        "dtype": model["dtype"],
        "hit_tokens_per_prompt": round(hits / rounds, 1),
        "ttft_ms_apart": round(without * 1e3, 3),
        "ttft_ms_shared": round(with_cache * 1e3, 3),
        "times_lower": round(without / with_cache, 2),
    }


async def _hits(client: AsyncClient) -> int:
    """Prompt tokens that were found in the caches; groups report them once a second."""
    await asyncio.sleep(_REPORT_S)
    groups = (await client.status())["groups"]
    return sum(group["scheduler"]["prefix_hit_tokens"] for group in groups)
