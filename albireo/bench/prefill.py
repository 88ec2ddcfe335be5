"""`albireo bench prefill`: prompts through the whole engine, against what matrix products cost.

A real node serves the shape with random weights.  A prompt's time is from its
submission to its first token at the client.  The floor is the products of the
linear layers at the rate of a large product on the same device: 2 operations
for each token and each of their weights that it has to meet, which are few in the last
layer; attention is counted as nothing, so a long prompt is further from it.

A mixed step is what the streams that decode see while one prompt is computed
between two of their tokens; beside it stand the two steps that it is made of.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import uvloop

from albireo.client import AsyncClient
from albireo.node.options import NodeOptions
from albireo.workers.models.config import ModelConfig
from albireo.workers.models.load import read_config

from .device_rates import measure_products
from .machine import machine, spare_the_collector
from .nodes import BenchError, running_node
from .shapes import shape_directory
from .streams import TimedStream, random_prompt, run_streams, time_prompts

_ROUNDS = 5
_MIXED_INPUT_LEN, _MIXED_OUTPUT_LEN = 256, 768
_CACHED = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
"""What all of a prompt's tokens go through in the last layer, too: it is one product."""
_QUIET_S = 0.15
"""Between two prompts of the mixed measurement."""


def bench_prefill(
    shape: str, options: NodeOptions, prompts: Sequence[tuple[int, int]], mixed: tuple[int, int]
) -> dict[str, Any]:
    """prompts: (how many at once, tokens of each).  mixed: (streams that decode, prompt tokens).

    Raises BenchError when the node does not start or tokens are missing.
    """
    if len(options.groups) != 1:
        raise BenchError("--groups: a prefill is that of one group; give 1xT")
    with shape_directory(shape) as directory:
        config = read_config(directory)
        most = max(_MIXED_INPUT_LEN + _MIXED_OUTPUT_LEN, *(length for _, length in prompts))
        options = msgspec.structs.replace(
            options,
            model=directory,
            served_model_name=shape,
            load_format="dummy",
            max_num_seqs=max(mixed[0] + 1, *(count for count, _ in prompts)),
            max_model_len=min(config.context_len, most + 16),
            max_num_batched_tokens=max(
                sum(mixed) + 1, *(count * length for count, length in prompts)
            ),
            mixed_step_tokens=0,
            enable_prefix_caching=False,
        )
        with running_node(options) as node:
            measured = uvloop.run(_measure(node, prompts, mixed))
        device, dtype = measured.pop("device"), measured.pop("dtype")
        rate = measure_products(device, dtype)
    for row in measured["prompts"]:
        tokens = row["prompts"] * row["tokens"]
        floor_s = 2 * _products(config, row["prompts"], tokens) / (rate * options.groups[0])
        row["floor_tokens_per_s"] = round(tokens / floor_s)
        row["ratio"] = round(row["ms"] / 1e3 / floor_s, 3)
    return {
        "bench": "prefill",
        "machine": machine(),
        "shape": shape,
        "device": device,
        "dtype": dtype,
        "groups": list(options.groups),
        "cuda_graphs": options.cuda_graphs,
        "product_tflop_per_s": round(rate / 1e12, 1),
        **measured,
    }


def _products(config: ModelConfig, prompts: int, tokens: int) -> float:
    """Multiplications of the layers for so many tokens of so many prompts.

    Neither embedding nor LM head, nor experts that the router does not pick for a token; of the
    last layer, behind its keys and values, one token of each prompt.
    """
    last = config.num_layers - 1
    return sum(
        each * (prompts if layer == last and module not in _CACHED else tokens)
        for layer, module, each in config.products()
    )


async def _measure(
    node: str, prompts: Sequence[tuple[int, int]], mixed: tuple[int, int]
) -> dict[str, Any]:
    rng = random.Random(0)
    async with await AsyncClient.connect(node=node) as client:
        model = (await client.status())["model"]
        rows = []
        for count, length in prompts:
            times = [await _prompt_s(client, rng, count, length) for _ in range(_ROUNDS + 1)][1:]
            median = statistics.median(times)
            rows.append(
                {
                    "prompts": count,
                    "tokens": length,
                    "ms": round(median * 1e3, 2),
                    "tokens_per_s": round(count * length / median),
                }
            )
        return {
            "device": model["device"],
            "dtype": model["dtype"],
            "prompts": rows,
            "mixed": await _mixed(client, rng, *mixed),
        }


async def _prompt_s(client: AsyncClient, rng: random.Random, count: int, length: int) -> float:
    spare_the_collector()
    return await time_prompts(client, [random_prompt(client, rng, length) for _ in range(count)])


async def _mixed(
    client: AsyncClient, rng: random.Random, decodes: int, length: int
) -> dict[str, Any]:
    alone = [await _prompt_s(client, rng, 1, length) for _ in range(_ROUNDS + 1)][1:]
    input_len = min(_MIXED_INPUT_LEN, client.welcome.max_model_len // 4)
    tokens = min(_MIXED_OUTPUT_LEN, client.welcome.max_model_len - input_len)
    running: list[TimedStream] = []
    task = asyncio.create_task(
        run_streams(client, rng, decodes, input_len, tokens, "greedy", running)
    )
    while len(running) < decodes or not all(stream.arrivals for stream in running):
        if task.done():
            break
        await asyncio.sleep(0.001)
    insertions: list[tuple[float, float]] = []
    while not task.done() and len(insertions) < _ROUNDS:
        # The first at once: streams of a small model last hardly longer than what follows it.
        begun = time.perf_counter()
        await _prompt_s(client, rng, 1, length)
        insertions.append((begun, time.perf_counter()))
        await asyncio.sleep(_QUIET_S)
    streams = await task
    gaps = _gaps(streams[0])
    with_prompt = [
        max(gap for at, gap in gaps if begun <= at <= ended + gap)
        for begun, ended in insertions
        if any(begun <= at <= ended + gap for at, gap in gaps)
    ]
    if not with_prompt:
        raise BenchError("no prompt met the streams while they decoded: they ended too soon")
    step = statistics.median(gap for _, gap in gaps)
    prompt, both = statistics.median(alone), statistics.median(with_prompt)
    return {
        "decodes": decodes,
        "prompt_tokens": length,
        "decode_step_ms": round(step * 1e3, 3),
        "prompt_alone_ms": round(prompt * 1e3, 3),
        "mixed_step_ms": round(both * 1e3, 3),
        "mixed_over_sum": round(both / (step + prompt), 3),
        "samples": len(with_prompt),
    }


def _gaps(stream: TimedStream) -> list[tuple[float, float]]:
    """(arrival, seconds since the one before) of every token but the first."""
    times = [at for at, _ in stream.arrivals]
    return [(at, at - before) for before, at in itertools.pairwise(times)]
