"""Whole batches through an LLM, timed: `albireo bench latency` and `albireo bench throughput`."""

from __future__ import annotations

import random
import statistics
import time
from typing import Any

import msgspec
import numpy as np

from albireo.client import SamplingParams
from albireo.node.options import NodeOptions
from albireo.offline import LLM

from .machine import machine, spare_the_collector
from .nodes import BenchError, running_llm
from .serving.datasets import DatasetOptions, make_requests
from .streams import plain_ids, random_prompt

_PERCENTILES = (10, 25, 50, 75, 90, 99)
_WARM_UP_TOKENS = 8


def bench_latency(
    options: NodeOptions, batch: int, input_len: int, output_len: int, warmups: int, iterations: int
) -> dict[str, Any]:
    """Seconds from a batch's submission to its last token, `iterations` times.

    Prompts are new each time, so that the prefix cache has none of them.
    Each request has `input_len` prompt tokens and generates exactly `output_len`, greedily.
    """
    with running_llm(_with_room(options, batch)) as llm:
        rng = random.Random(0)
        for _ in range(warmups):
            _run_batch(llm, rng, batch, input_len, output_len)
        spare_the_collector()
        walls = [_run_batch(llm, rng, batch, input_len, output_len) for _ in range(iterations)]
        about = _about("latency", llm, options)
    return about | {
        "batch_size": batch,
        "input_len": input_len,
        "output_len": output_len,
        "avg_latency": round(statistics.fmean(walls), 6),
        "percentiles": {
            str(each): round(float(np.percentile(walls, each)), 6) for each in _PERCENTILES
        },
        "latencies": [round(wall, 6) for wall in walls],
        "tokens_per_s": round(batch * output_len / statistics.median(walls), 1),
    }


def bench_batches(
    options: NodeOptions, batches: list[int], input_len: int, output_len: int, repeats: int
) -> dict[str, Any]:
    """New tokens a second of each size of batch, `repeats` times after a warm-up."""
    with running_llm(_with_room(options, max(batches))) as llm:
        rng = random.Random(0)
        _run_batch(llm, rng, 1, input_len, _WARM_UP_TOKENS)
        spare_the_collector()
        results = []
        for batch in batches:
            walls = [_run_batch(llm, rng, batch, input_len, output_len) for _ in range(repeats)]
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
        about = _about("throughput", llm, options)
    return about | {
        "input_len": input_len,
        "output_len": output_len,
        "repeats": repeats,
        "results": results,
    }


def bench_dataset(options: NodeOptions, dataset: DatasetOptions) -> dict[str, Any]:
    """All prompts of a data set at once, as fast as the node takes them; answers of full length.

    Made-up ids are of the model's vocabulary.  Raises DatasetError, before the node starts.
    """
    make_requests(dataset)
    with running_llm(options) as llm:
        ids = plain_ids(llm.client.welcome.vocab_size)
        asked = make_requests(msgspec.structs.replace(dataset, ids=(ids.start, ids.stop)))
        params = [_full_length(each.output_len) for each in asked]
        _run_batch(llm, random.Random(dataset.seed), 1, 1, _WARM_UP_TOKENS)
        spare_the_collector()
        began = time.perf_counter()
        answers = llm.generate([each.prompt for each in asked], params)
        wall_s = time.perf_counter() - began
        about = _about("throughput", llm, options)
    prompt_tokens = sum(each.usage.prompt_tokens for each in answers)
    new_tokens = sum(each.usage.completion_tokens for each in answers)
    return about | {
        "dataset": dataset.name,
        "num_requests": len(asked),
        "elapsed_time": round(wall_s, 3),
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": new_tokens,
        "requests_per_second": round(len(asked) / wall_s, 3),
        "output_tokens_per_second": round(new_tokens / wall_s, 1),
        "tokens_per_second": round((prompt_tokens + new_tokens) / wall_s, 1),
    }


def _with_room(options: NodeOptions, batch: int) -> NodeOptions:
    return msgspec.structs.replace(options, max_num_seqs=max(options.max_num_seqs, batch))


def _full_length(tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0)


def _about(bench: str, llm: LLM, options: NodeOptions) -> dict[str, Any]:
    return {
        "bench": bench,
        "machine": machine(),
        "model": llm.client.models()[0].id,
        "groups": list(options.groups),
        "async_scheduling": options.async_scheduling,
        "batch_invariant": options.batch_invariant,
    }


def _run_batch(llm: LLM, rng: random.Random, batch: int, input_len: int, output_len: int) -> float:
    """Seconds from the first request's submission to the last one's end."""
    prompts = [random_prompt(llm.client, rng, input_len) for _ in range(batch)]
    params = _full_length(output_len)
    began = time.perf_counter()
    answers = llm.generate(prompts, params, progress=False)
    wall_s = time.perf_counter() - began
    for answer in answers:
        if len(answer.token_ids) != output_len:
            raise BenchError(f"{len(answer.token_ids)} tokens came instead of {output_len}")
    return wall_s
