"""`albireo bench step`: a decode step through the whole engine, against what memory must deliver.

A real node serves the shape with random weights.  One client opens `batch`
streams with prompts of their own at once; every token comes to it through
scheduler, rings, detokenizer and router.  A step's time is the time between two
tokens of a stream at that client, taken while all streams decode and none has
ended, so the contexts grow and no prefill runs.

The floor is the bytes that a step cannot avoid, over the bandwidth of a large
copy on the same device: the weights but for the input embedding, of which only
the batch's rows are read, and the keys and values of all sequences at the
middle of the measured answer.  On several ranks each has its share; all-reduces
are taken to cost nothing.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from albireo.client import AlbireoError, AsyncClient, Delta, SamplingParams
from albireo.node.options import NodeOptions
from albireo.workers.models.config import ModelConfig
from albireo.workers.models.load import read_config

from .bandwidth import measure_bandwidth
from .machine import machine, spare_the_collector
from .nodes import BenchError, running_node
from .shapes import write_model

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "full": {"temperature": 0.8, "top_p": 0.95, "top_k": 50, "min_p": 0.02},
}
_FIRST_ID = 300  # Past the tokenizer's end token.
_MIN_STEPS = 8
_LAST_REPORT_S = 0.3


class _Stream:
    """Arrival times of one request's tokens at the client, monotonic seconds."""

    __slots__ = ("_on_end", "arrivals", "tokens", "wrong")

    def __init__(self, on_end: Any) -> None:
        self._on_end = on_end
        self.arrivals: list[tuple[float, int]] = []
        self.tokens = 0
        self.wrong: str | None = None

    def receive(self, reply: Delta | AlbireoError) -> None:
        if not isinstance(reply, Delta):
            self.wrong = str(reply)
            self._on_end()
            return
        if reply.token_ids:
            self.tokens += len(reply.token_ids)
            self.arrivals.append((time.perf_counter(), len(reply.token_ids)))
        if reply.end is not None:
            self._on_end()


def bench_step(
    shape: str,
    options: NodeOptions,
    batches: list[int],
    input_len: int,
    output_len: int,
    sampling: str,
) -> dict[str, Any]:
    """One node for all batch sizes; `options` give groups, device and switches.

    Raises BenchError when the node does not start or tokens are missing.
    """
    if sampling not in SAMPLING:
        raise BenchError(f"--sampling {sampling}: not one of {', '.join(SAMPLING)}")
    if len(options.groups) != 1:
        raise BenchError("--groups: a step is that of one group; give 1xT")
    with tempfile.TemporaryDirectory(prefix="albireo-shape-") as directory:
        write_model(shape, Path(directory))
        config = read_config(directory)
        most = max(batches)
        length = input_len + output_len
        options = msgspec.structs.replace(
            options,
            model=directory,
            served_model_name=shape,
            load_format="dummy",
            max_num_seqs=most,
            max_model_len=min(config.context_len, length + 16),
            # Prompts soon in, so that all streams decode together for long.
            max_num_batched_tokens=max(8192, most) if options.device != "cpu" else None,
        )
        began = time.monotonic()
        with running_node(options) as node:
            ready_s = time.monotonic() - began
            measured = uvloop.run(_measure(node, batches, input_len, output_len, sampling))
        device, dtype = measured.pop("device"), measured.pop("dtype")
        bandwidth = measure_bandwidth(device)
    for row in measured["results"]:
        context = input_len + row.pop("first_token") + row["steps"] / 2
        _add_floor(row, config, options.groups[0], dtype, context, bandwidth)
    return {
        "bench": "step",
        "machine": machine(),
        "shape": shape,
        "device": device,
        "dtype": dtype,
        "groups": list(options.groups),
        "async_scheduling": options.async_scheduling,
        "cuda_graphs": options.cuda_graphs,
        "input_len": input_len,
        "output_len": output_len,
        "sampling": {"name": sampling, **SAMPLING[sampling], "penalties": "not supported yet"},
        "ready_s": round(ready_s, 2),
        "copy_gb_per_s": round(bandwidth / 1e9, 1),
        "all_reduce": "counted as 0 in the floor" if options.groups[0] > 1 else "none",
        **measured,
    }


async def _measure(
    node: str, batches: list[int], input_len: int, output_len: int, sampling: str
) -> dict[str, Any]:
    rng = random.Random(0)
    async with await AsyncClient.connect(node=node) as client:
        model = (await client.status())["model"]
        results = []
        for batch in batches:
            # The first round warms up what is made at a batch's first step.
            await _run(client, rng, batch, input_len, min(output_len, 8), sampling)
            spare_the_collector()
            streams = await _run(client, rng, batch, input_len, output_len, sampling)
            row = _times(streams, output_len)
            await asyncio.sleep(_LAST_REPORT_S)
            row["worker_mean_ms"] = await _worker_means(client)
            results.append({"batch": batch, **row})
    return {"device": model["device"], "dtype": model["dtype"], "results": results}


async def _run(
    client: AsyncClient, rng: random.Random, batch: int, input_len: int, tokens: int, sampling: str
) -> list[_Stream]:
    """`batch` requests at once; returns when the last has ended.  Raises BenchError."""
    done = asyncio.Event()
    running = batch

    def on_end() -> None:
        nonlocal running
        running -= 1
        if running == 0:
            done.set()

    vocab = client.welcome.vocab_size
    streams = []
    for _ in range(batch):
        stream = _Stream(on_end)
        prompt = [rng.randrange(_FIRST_ID, vocab) for _ in range(input_len)]
        params = SamplingParams(
            max_tokens=tokens, ignore_eos=True, seed=rng.randrange(2**31), **SAMPLING[sampling]
        )
        client.submit(prompt, stream.receive, params)
        streams.append(stream)
    await done.wait()
    for stream in streams:
        if stream.wrong is not None:
            raise BenchError(f"a stream of the batch of {batch} failed: {stream.wrong}")
        if stream.tokens != tokens:
            raise BenchError(f"{stream.tokens} tokens came instead of {tokens}")
    return streams


def _times(streams: list[_Stream], output_len: int) -> dict[str, Any]:
    """Times between tokens while all streams decode; raises BenchError when that is too short."""
    first = max(stream.arrivals[0][0] for stream in streams)
    last = min(stream.arrivals[-1][0] for stream in streams)
    gaps: list[float] = []
    merged = seen = 0
    for stream in streams:
        within = [each for each in stream.arrivals if first <= each[0] <= last]
        for (before, _), (at, tokens) in itertools.pairwise(within):
            gaps += [(at - before) / tokens] * tokens
            merged += tokens - 1
        seen = max(seen, sum(tokens for at, tokens in stream.arrivals if at < first))
    steps = len(gaps) // len(streams)
    if steps < _MIN_STEPS:
        raise BenchError(
            f"only {steps} steps had all {len(streams)} streams decoding: raise --output-len "
            f"above {output_len}"
        )
    gaps.sort()
    return {
        "steps": steps,
        "first_token": seen,
        "step_ms_median": round(statistics.median(gaps) * 1e3, 3),
        "step_ms_p99": round(gaps[math.ceil(len(gaps) * 0.99) - 1] * 1e3, 3),
        "step_ms_mean": round(statistics.fmean(gaps) * 1e3, 3),
        "tokens_merged": merged,
    }


async def _worker_means(client: AsyncClient) -> dict[str, float]:
    """As rank 0 saw it: means of the last second or less of the run, prefill steps among them."""
    stats = (await client.status())["groups"][0]["scheduler"]
    return {"step": stats["step_ms_mean"], "forward": stats["forward_ms_mean"]}


def _add_floor(
    row: dict[str, Any], config: ModelConfig, tp: int, dtype: str, context: float, bandwidth: float
) -> None:
    """The bytes of a step on each rank, the time they take, and what the step takes of that."""
    element = 2 if dtype == "bfloat16" else 4
    read = config.num_params()
    if not config.tie_embeddings:
        read -= config.vocab_size * config.hidden_size
    kv_token = 2 * config.num_layers * config.num_kv_heads * config.head_dim * element
    weights, kv = read * element / tp, row["batch"] * context * kv_token / tp
    floor_ms = (weights + kv) / bandwidth * 1e3
    row["weights_gb"] = round(weights / 1e9, 3)
    row["kv_gb"] = round(kv / 1e9, 3)
    row["floor_ms"] = round(floor_ms, 3)
    row["ratio"] = round(row["step_ms_median"] / floor_ms, 3)
