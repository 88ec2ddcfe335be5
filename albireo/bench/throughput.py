"""`albireo bench throughput`: new tokens a second of whole batches, prefill included."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from typing import Any

import msgspec
import uvloop

from albireo.client import AsyncClient, SamplingParams
from albireo.node.options import NodeOptions

from .machine import machine
from .nodes import BenchError, running_node

_SPECIAL_IDS = 64
"""Low ids are often special tokens; random prompts stay above them."""


def bench_throughput(
    options: NodeOptions, batches: list[int], input_len: int, output_len: int, repeats: int
) -> dict[str, Any]:
    """Runs a node; for each batch size, `repeats` batches of random prompts after a warm-up.

    Each request has `input_len` prompt tokens of its own and generates exactly
    `output_len` greedily.
    """
    options = msgspec.structs.replace(options, max_num_seqs=max(options.max_num_seqs, max(batches)))
    with running_node(options) as node:
        return uvloop.run(_measure(node, options, batches, input_len, output_len, repeats))


async def _measure(
    node: str,
    options: NodeOptions,
    batches: list[int],
    input_len: int,
    output_len: int,
    repeats: int,
) -> dict[str, Any]:
    rng = random.Random(0)
    async with await AsyncClient.connect(node=node) as client:
        tree = await client.status()
        await _run_batch(client, rng, 1, input_len, 8)
        results = []
        for batch in batches:
            walls = [
                await _run_batch(client, rng, batch, input_len, output_len) for _ in range(repeats)
            ]
            rates = [batch * output_len / wall for wall in walls]
            results.append(
                {
                    "batch": batch,
                    "tokens_per_s": round(statistics.median(rates), 1),
                    "tokens_per_s_min": round(min(rates), 1),
                    "tokens_per_s_max": round(max(rates), 1),
                    "wall_s": round(statistics.median(walls), 3),
                }
            )
    return {
        "bench": "throughput",
        "machine": machine(),
        "model": tree["model"],
        "groups": list(options.groups),
        "async_scheduling": options.async_scheduling,
        "batch_invariant": options.batch_invariant,
        "input_len": input_len,
        "output_len": output_len,
        "repeats": repeats,
        "results": results,
    }


async def _run_batch(
    client: AsyncClient, rng: random.Random, batch: int, input_len: int, output_len: int
) -> float:
    """Seconds from the first request's submission to the last one's end."""
    vocab = client.welcome.vocab_size
    first = min(_SPECIAL_IDS, vocab // 2)
    prompts = [[rng.randrange(first, vocab) for _ in range(input_len)] for _ in range(batch)]
    params = SamplingParams(max_tokens=output_len, ignore_eos=True, temperature=0.0)
    began = time.monotonic()
    answers = await asyncio.gather(*(client.generate(prompt, params) for prompt in prompts))
    wall = time.monotonic() - began
    for answer in answers:
        if len(answer.token_ids) != output_len:
            raise BenchError(f"{len(answer.token_ids)} tokens came instead of {output_len}")
    return wall
