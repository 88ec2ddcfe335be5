"""`albireo bench step`: a decode step through the whole engine, against what memory must deliver.

A real node serves the shape with random weights.  One client opens `batch`
streams with prompts of their own at once; every token comes to it through
scheduler, rings, detokenizer and router.  A step's time is the time between two
tokens of a stream at that client, taken while all streams decode and none has
ended, so the contexts grow and no prefill runs; those of several rounds are taken together,
because P99 of 120 steps is the second latest of them.  Where there are cores for it the client
polls instead of sleeping between tokens.  Steps at which the machine itself was slow
(disturbance.py) are counted, and P99 is also given without them; so are how slow the machine was,
what the threads of each process, the client's too, have waited for a core (core_waits.py), and
what the same steps took on the device itself (device_steps.py).

The floor is the bytes that a step cannot avoid, over the bandwidth of a large
copy on the same device: the weights, those of all linear layers at 12 bits where
the node has some so (--e4m7-weights), but for the input embedding, of which only
the batch's rows are read, and for experts that no row picks, and the keys and
values of all sequences at the middle of the measured answer.  On several ranks
each has its share, and to that come the all-reduces, two a layer and the
embedding's, each at the least that the ranks measured for its bytes when they
started.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import uvloop

from albireo.client import AsyncClient
from albireo.ipc.actor import ALL_REDUCE_US
from albireo.ipc.config import blocks_for
from albireo.ipc.cpu_quota import usable_cores
from albireo.ipc.paths import node_dir
from albireo.node.core_plan import make_core_plan
from albireo.node.kv_cache import e4m7_kv_bytes
from albireo.node.options import NodeOptions
from albireo.node.runtime_dir import read_facts
from albireo.workers.models.config import ModelConfig
from albireo.workers.models.load import read_config

from .core_waits import CoreWaits
from .device_rates import measure_bandwidth
from .device_steps import DeviceSteps
from .disturbance import Watcher
from .machine import collector_at_rest, machine, polling
from .nodes import BenchError, running_node
from .shapes import shape_directory
from .streams import (
    MIN_STEPS,
    SAMPLING,
    TRIES,
    Round,
    run_streams,
    steady,
    step_times,
    steps_together,
)

_LAST_REPORT_S = 0.3


def bench_step(
    shape: str,
    options: NodeOptions,
    batches: list[int],
    input_len: int,
    output_len: int,
    sampling: str,
    client_polls: bool = True,
    rounds: int = 1,
) -> dict[str, Any]:
    """One node for all batch sizes; `options` give groups, device and switches.

    rounds: of each size, whose steps are taken together.  client_polls: where a core is left for
    it.  Sizes that the KV cache cannot hold are in "no_room", with the reason.  Raises BenchError
    when the node does not start or tokens are missing.
    """
    if sampling not in SAMPLING:
        raise BenchError(f"--sampling {sampling}: not one of {', '.join(SAMPLING)}")
    if len(options.groups) != 1:
        raise BenchError("--groups: a step is that of one group; give 1xT")
    with with_model(shape, options, max(batches), input_len + output_len) as options:
        config = read_config(options.model)
        began = time.monotonic()
        with running_node(options) as node:
            ready_s = time.monotonic() - began
            measured = uvloop.run(
                _measure(
                    node, options.groups, batches, input_len, output_len, sampling, client_polls,
                    rounds,
                )
            )  # fmt: skip
        bandwidth = measure_bandwidth(measured["device"])
    if not measured["results"]:
        raise BenchError("; ".join(each["reason"] for each in measured["no_room"]))
    sums_us = {int(nbytes): us for nbytes, us in measured["all_reduce_us"].items()}
    for row in measured["results"]:
        context = input_len + row.pop("first_token") + row["steps"] / rounds / 2
        _add_floor(row, config, options.groups[0], measured, context, bandwidth, sums_us)
    return {
        "bench": "step",
        "machine": machine(),
        "shape": shape,
        "groups": list(options.groups),
        "async_scheduling": options.async_scheduling,
        "cuda_graphs": options.cuda_graphs,
        "input_len": input_len,
        "output_len": output_len,
        "rounds": rounds,
        "sampling": {"name": sampling, **SAMPLING[sampling]},
        "ready_s": round(ready_s, 2),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        **measured,
    }


def sized(options: NodeOptions, most: int, length: int, context_len: int) -> NodeOptions:
    """With room for `most` streams of `length` tokens, all decoding together for long.

    Without prefix caching: no prompt is like another, and blocks need no names.
    """
    return msgspec.structs.replace(
        options,
        max_num_seqs=most,
        max_model_len=min(context_len, length + 16),
        max_num_batched_tokens=max(8192, most) if options.device != "cpu" else None,
        mixed_step_tokens=0,
        enable_prefix_caching=False,
    )


def _core_is_left(groups: tuple[int, ...], device: str) -> bool:
    """Whether the node has so many cores that its actors poll, and one more."""
    cores = usable_cores() - 1
    return cores > 0 and make_core_plan(groups, device, None, cores=cores).spin_us > 0


@contextlib.contextmanager
def with_model(
    shape: str | None, options: NodeOptions, batch: int, length: int
) -> Iterator[NodeOptions]:
    """The options with the model in them, and room for `batch` streams of `length` tokens.

    shape: with random weights; None: the model of `options`.
    """
    if shape is None:
        yield msgspec.structs.replace(options, max_num_seqs=batch)
        return
    with shape_directory(shape) as directory:
        context_len = read_config(directory).context_len
        yield msgspec.structs.replace(
            sized(options, batch, length, context_len),
            model=directory,
            served_model_name=shape,
            load_format="dummy",
        )


async def _measure(
    node: str,
    groups: tuple[int, ...],
    batches: list[int],
    input_len: int,
    output_len: int,
    sampling: str,
    client_polls: bool,
    rounds: int,
) -> dict[str, Any]:
    rng = random.Random(0)
    async with await AsyncClient.connect(node=node) as client:
        status = await client.status()
        model = status["model"]
        pids = {actor["name"]: actor["pid"] for actor in status["actors"]} | {"client": os.getpid()}
        device = DeviceSteps(node_dir(node))
        client_polls = client_polls and _core_is_left(groups, model["device"])
        stats = await _scheduler_stats(client)
        results, no_room = [], []
        for batch in batches:
            if reason := _lacks_room(stats, batch, input_len + output_len):
                no_room.append({"batch": batch, "reason": reason})
                continue
            # The first round warms up what is made at a batch's first step.
            await run_streams(client, rng, batch, input_len, min(output_len, 8), sampling)
            waits = CoreWaits(pids)
            async with polling(client_polls):
                measured = [
                    await run_round(client, rng, batch, input_len, output_len, sampling, device)
                    for _ in range(rounds)
                ]
            row = step_times(measured, output_len)
            row["core_waits_ms"] = waits.waited()
            row["stolen_ms"] = waits.stolen_ms()
            await asyncio.sleep(_LAST_REPORT_S)
            row["worker_mean_ms"] = await _worker_means(client)
            results.append({"batch": batch, **row})
    details = (read_facts(node) or {}).get("details", {})
    return {
        "all_reduce_us": details.get("g0.worker0", {}).get(ALL_REDUCE_US, {}),
        "device": model["device"],
        "dtype": model["dtype"],
        "e4m7_weights": model["e4m7_weights"],
        "kv_cache_dtype": model["kv_cache_dtype"],
        "client_polls": client_polls,
        "results": results,
        "no_room": no_room,
    }


def _lacks_room(stats: dict[str, Any], batch: int, length: int) -> str:
    """Why the KV cache cannot hold `batch` streams of so many tokens together; "" where it can."""
    blocks = stats["kv_blocks_total"]
    block_size = stats["kv_tokens_total"] // blocks
    needed = batch * blocks_for(length, block_size)
    if needed <= blocks:
        return ""
    return (
        f"{batch} streams of {length} tokens need {needed} KV blocks of {block_size} tokens, and "
        f"the group has {blocks}: lower --batch, --input-len or --output-len, or spread the model "
        "over more GPUs with --groups"
    )


async def _scheduler_stats(client: AsyncClient) -> dict[str, Any]:
    """Of the group's last report, or of its first."""
    while (stats := (await client.status())["groups"][0]["scheduler"]) is None:
        await asyncio.sleep(_LAST_REPORT_S / 10)
    found: dict[str, Any] = stats
    return found


async def run_round(
    client: AsyncClient,
    rng: random.Random,
    batch: int,
    input_len: int,
    output_len: int,
    sampling: str,
    device: DeviceSteps,
) -> Round:
    """Streams that decoded together; where they did not, for the machine was busy, once more.

    device: of the client's node.  The last of a few tries, whatever it was.  Raises BenchError
    when a stream fails.
    """
    for _ in range(TRIES):
        with collector_at_rest(), Watcher() as watcher:
            streams = await run_streams(client, rng, batch, input_len, output_len, sampling)
            found = Round(streams, watcher.slow_moments())
        if (steps := steps_together(found)) >= MIN_STEPS:
            break
    # By now the device's last records are there, too: they come behind the tokens.
    found = found._replace(device=device.before(steady(streams)[1], steps))
    return found


async def _worker_means(client: AsyncClient) -> dict[str, float]:
    """As rank 0 saw it: means of the last second or less of the run, prefill steps among them."""
    stats = await _scheduler_stats(client)
    return {"step": stats["step_ms_mean"], "forward": stats["forward_ms_mean"]}


def _add_floor(
    row: dict[str, Any], config: ModelConfig, tp: int, measured: dict[str, Any], context: float,
    bandwidth: float, sums_us: Mapping[int, float],
) -> None:  # fmt: skip
    """The bytes of a step on each rank, the time they take, its all-reduces', and what the step
    takes of all that.

    sums_us: microseconds of an all-reduce by its bytes; empty where ranks have not measured any,
    as on the CPU, and then they count as nothing.
    """
    element = 2 if measured["dtype"] == "bfloat16" else 4
    read = config.num_params() - _unread_experts(config, row["batch"])
    if not config.tie_embeddings:
        read -= config.vocab_size * config.hidden_size
    windows = [config.window(layer) for layer in range(config.num_layers)]
    seen = sum(min(context, window or context) for window in windows)
    kv_token = 2 * config.num_kv_heads * config.head_dim * element
    if measured["kv_cache_dtype"] == "e4m7":
        kv_token = e4m7_kv_bytes(kv_token, config.head_dim)
    spared = 0.0
    if measured["e4m7_weights"] != "off":
        spared = config.e4m7_params(tp) / 2  # Bytes of four bits.
    weights = (read * element - spared) / tp
    kv = row["batch"] * seen * kv_token / tp
    row["all_reduce_ms"] = 0.0
    if tp > 1 and sums_us:
        sizes = sorted(sums_us)
        nbytes = row["batch"] * config.hidden_size * element
        us = float(np.interp(nbytes, sizes, [sums_us[size] for size in sizes]))
        row["all_reduce_ms"] = round((2 * config.num_layers + 1) * us / 1e3, 3)
    floor_ms = (weights + kv) / bandwidth * 1e3 + row["all_reduce_ms"]
    row["weights_gb"] = round(weights / 1e9, 3)
    row["kv_gb"] = round(kv / 1e9, 3)
    row["floor_ms"] = round(floor_ms, 3)
    row["ratio"] = round(row["step_ms_median"] / floor_ms, 3)


def _unread_experts(config: ModelConfig, batch: int) -> float:
    """Weights of experts that no row of a step picks, if rows pick evenly and independently."""
    if not config.num_experts:
        return 0.0
    layers = sum(config.is_sparse(layer) for layer in range(config.num_layers))
    unread = config.num_experts * (1 - config.experts_per_token / config.num_experts) ** batch
    return layers * unread * 3 * config.hidden_size * config.expert_size
