"""`albireo bench ablation`: what each part of the asynchronous runtime is worth.

The same requests run on a node after another, each with one part switched off.
Where a step's time goes is read from the node's timelines (albireo/trace), of
the steps in which all streams decode: the forward pass, and the exposed time of
the other tasks, which is what the device waits for.  That is Table 1 of the
paper, measured on our own.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import uvloop

from albireo.client import AsyncClient
from albireo.ipc.paths import node_dir
from albireo.node.options import NodeOptions
from albireo.trace.capture import MAX_STEPS
from albireo.trace.rows import NodeTimelines
from albireo.trace.stages import StageStats, group_stages

from .machine import collector_at_rest, machine
from .nodes import BenchError, running_node
from .step import with_model
from .streams import (
    MIN_STEPS,
    SAMPLING,
    TRIES,
    Round,
    TimedStream,
    run_streams,
    steady,
    step_times,
    steps_together,
)

_WARM_UP_TOKENS = 8
_SETTLE_S = 0.1
_EVERY_SETTING_OFF: dict[str, Any] = {
    "async_scheduling": False,
    "async_output": False,
    "sampling_mode": "gather",
    "cuda_graphs": False,
}
SETTINGS: dict[str, dict[str, Any]] = {
    "all on": {},
    "--no-async-scheduling": {"async_scheduling": False},
    "--no-async-output": {"async_output": False},
    "--sampling-mode gather": {"sampling_mode": "gather"},
    "--sampling-mode sequence": {"sampling_mode": "sequence"},
    "--sampling-mode vocab": {"sampling_mode": "vocab"},
    "--no-cuda-graphs": {"cuda_graphs": False},
    "all off": _EVERY_SETTING_OFF,
}
"""What is switched off, by its name on the command line."""


def bench_ablation(
    shape: str | None,
    options: NodeOptions,
    batch: int,
    input_len: int,
    output_len: int,
    sampling: str,
    settings: Sequence[str] = (),
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """A node for each setting; all of them where none is named.

    shape: with random weights; None: the model of `options`.

    Raises BenchError when a node does not start or has too few steps.
    """
    if sampling not in SAMPLING:
        raise BenchError(f"--sampling {sampling}: not one of {', '.join(SAMPLING)}")
    if len(options.groups) != 1:
        raise BenchError("--groups: a step is that of one group; give 1xT")
    for name in settings:
        if name not in SETTINGS:
            raise BenchError(f"--setting {name!r}: not one of {', '.join(SETTINGS)}")
    results: list[dict[str, Any]] = []
    device = dtype = model = ""
    with with_model(shape, options, batch, input_len + output_len) as options:
        for name, changes in SETTINGS.items():
            if settings and name not in settings:
                continue
            if name == "--no-cuda-graphs" and not settings and device != "cuda":
                continue
            say(name)
            with running_node(msgspec.structs.replace(options, **changes)) as node:
                measured = uvloop.run(_measure(node, batch, input_len, output_len, sampling))
            device, dtype, model = (measured.pop(key) for key in ("device", "dtype", "model"))
            results.append({"setting": name, **measured})
    return {
        "bench": "ablation",
        "machine": machine(),
        "model": model,
        "device": device,
        "dtype": dtype,
        "groups": list(options.groups),
        "batch": batch,
        "input_len": input_len,
        "output_len": output_len,
        "sampling": {"name": sampling, **SAMPLING[sampling]},
        "results": results,
    }


async def _measure(
    node: str, batch: int, input_len: int, output_len: int, sampling: str
) -> dict[str, Any]:
    rng = random.Random(0)
    async with await AsyncClient.connect(node=node) as client:
        model = (await client.status())["model"]
        await run_streams(client, rng, batch, input_len, _WARM_UP_TOKENS, sampling)
        streams = partial(run_streams, client, rng, batch, input_len, output_len, sampling)
        found, stats = await run_round(streams, partial(_stages, node))
    at_client = step_times([found], output_len)
    return {
        "device": model["device"],
        "dtype": model["dtype"],
        "model": model["id"],
        "steps": stats.steps,
        "step_ms": round(stats.step_us_mean / 1000, 3),
        "step_ms_median": round(stats.step_us_median / 1000, 3),
        "step_ms_p99": round(stats.step_us_p99 / 1000, 3),
        "step_ms_median_at_client": at_client["step_ms_median"],
        "forward_ms": round(stats.forward.mean_us / 1000, 3),
        "exposed_us": {
            "T1": stats.schedule.exposed_us,
            "T2": stats.input.exposed_us,
            "T4": stats.sample.exposed_us,
            "T5": stats.output.exposed_us,
            "other": stats.other_exposed_us,
        },
        "idle_us": stats.idle_us_mean,
        "idle_us_p99": stats.idle_us_p99,
        "serial_fraction": stats.serial_fraction,
        "planned_ahead": stats.planned_ahead,
        "tokens_per_s": round(batch / stats.step_us_mean * 1e6, 1),
    }


async def run_round(
    run: Callable[[], Awaitable[Sequence[TimedStream]]],
    stages: Callable[[Sequence[TimedStream]], StageStats | None],
) -> tuple[Round, StageStats]:
    """Streams that decoded together, at the client and on the node, and their steps there; where
    they did not, for the machine was busy, once more.

    run: gives streams that have ended.  stages: of their steps on the node.  Raises BenchError
    when a stream fails, or when they never decoded together.
    """
    for _ in range(TRIES):
        with collector_at_rest():
            found = Round(await run())
        await asyncio.sleep(_SETTLE_S)
        stats = stages(found.streams)
        if stats is not None and min(stats.steps, steps_together(found)) >= MIN_STEPS:
            return found, stats
    raise BenchError(
        f"fewer than {MIN_STEPS} steps had all {len(found.streams)} streams decoding, {TRIES} "
        f"times: raise --output-len above {found.streams[0].tokens}"
    )


def _stages(node: str, streams: Sequence[TimedStream]) -> StageStats | None:
    """Of the steps in which all streams decode; None where there are hardly any."""
    first, last = steady(streams)
    window_ns = round(first * 1e9), round(last * 1e9)
    return group_stages(NodeTimelines(node_dir(node)).group(0), MAX_STEPS, window_ns)
