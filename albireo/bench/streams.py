"""Requests that decode together, with the time at which each token came to the client."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

from albireo.client import AlbireoError, AsyncClient, Client, Delta, SamplingParams

from .device_steps import DeviceTimes
from .disturbance import Moment
from .nodes import BenchError

SAMPLING: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "full": {
        "temperature": 0.8,
        "top_p": 0.95,
        "top_k": 50,
        "min_p": 0.02,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
    },
}
"""What `--sampling` names."""

_FIRST_ID = 300  # Past a byte-level tokenizer's end token.
MIN_STEPS = 8
"""At which all streams decode, for a round to say something."""
TRIES = 3
"""At such a round: a client that has no core for a while gets streams one after another."""
_SLOWEST = 4


class TimedStream:
    """arrivals: (time.perf_counter(), number of tokens) of one request's Deltas."""

    __slots__ = ("arrivals", "ended", "tokens", "wrong")

    def __init__(self) -> None:
        self.ended = asyncio.Event()
        self.arrivals: list[tuple[float, int]] = []
        self.tokens = 0
        self.wrong: str | None = None

    def receive(self, reply: Delta | AlbireoError) -> None:
        if not isinstance(reply, Delta):
            self.wrong = str(reply)
            self.ended.set()
            return
        if reply.token_ids:
            self.tokens += len(reply.token_ids)
            self.arrivals.append((time.perf_counter(), len(reply.token_ids)))
        if reply.end is not None:
            self.ended.set()


def plain_ids(vocab: int) -> range:
    """Token ids of a vocabulary that are hardly special ones."""
    return range(min(_FIRST_ID, vocab // 2), vocab)


def random_prompt(client: AsyncClient | Client, rng: random.Random, length: int) -> list[int]:
    """Token ids of the client's model, no special ones among them."""
    return rng.choices(plain_ids(client.welcome.vocab_size), k=length)


async def time_prompts(client: AsyncClient, prompts: list[list[int]]) -> float:
    """Seconds from the submission of prompts to the last one's first token, which ends it.

    Raises AlbireoError.
    """
    began = time.perf_counter()
    await asyncio.gather(*(client.generate(each, max_tokens=1, temperature=0) for each in prompts))
    return time.perf_counter() - began


async def run_streams(
    client: AsyncClient,
    rng: random.Random,
    batch: int,
    input_len: int,
    tokens: int,
    sampling: str,
    streams: list[TimedStream] | None = None,
) -> list[TimedStream]:
    """`batch` requests at once, prompts of their own; returns when the last has ended.

    streams: gets them as they are submitted.  Raises BenchError when one fails.
    """
    streams = [] if streams is None else streams
    for _ in range(batch):
        stream = TimedStream()
        prompt = random_prompt(client, rng, input_len)
        params = SamplingParams(
            max_tokens=tokens, ignore_eos=True, seed=rng.randrange(2**31), **SAMPLING[sampling]
        )
        client.submit(prompt, stream.receive, params)
        streams.append(stream)
    for stream in streams:
        await stream.ended.wait()
    for stream in streams:
        if stream.wrong is not None:
            raise BenchError(f"a stream of the batch of {batch} failed: {stream.wrong}")
        if stream.tokens != tokens:
            raise BenchError(f"{stream.tokens} tokens came instead of {tokens}")
    return streams


def steady(streams: Sequence[TimedStream]) -> tuple[float, float]:
    """From when to when all streams decode: prefill is over, and none has ended."""
    first = max(stream.arrivals[0][0] for stream in streams)
    return first, min(stream.arrivals[-1][0] for stream in streams)


class Round(NamedTuple):
    """Streams that decoded together, when the machine itself was slow, and what the same steps took
    on the device."""

    streams: Sequence[TimedStream]
    slow: Sequence[Moment] = ()
    device: DeviceTimes = DeviceTimes([], [])


class _Gaps(NamedTuple):
    """Times between the tokens of a round's streams while all of them decode.

    steps: so many on average over the streams.  quiet: those at no slow moment.  merged: tokens
    that came together with one before.  seen: the most that a stream had by then.
    """

    steps: int
    every: list[float]
    quiet: list[float]
    merged: int
    seen: int


def steps_together(round_: Round) -> int:
    """Steps at which all streams of a round decoded: none where some came only when others had
    ended, as where the client had no core meanwhile."""
    return _gaps(round_).steps


def step_times(rounds: Sequence[Round], output_len: int) -> dict[str, Any]:
    """Times between tokens while all streams of a round decode, of all rounds together.

    Raises BenchError when a round is too short.  The steps at slow moments are told, P99 without
    them, and how many times as long as usually the CPU's work took then (1 without such moments).
    device_ms_median, device_ms_p99, device_idle_ms_p99: of these steps on the device, or None.
    p99_ms_of_rounds: of each alone.  slowest_of_rounds: of each the (number, ms) of its slowest
    steps, counted from the first at which all decode.  median_ms_of_quarters: of the rounds'
    quarters, over which contexts grow.
    """
    found = [_gaps(each) for each in rounds]
    counts = [gaps.steps for gaps in found]
    if min(counts) < MIN_STEPS:
        raise BenchError(
            f"only {min(counts)} steps had all {len(rounds[0].streams)} streams decoding: raise "
            f"--output-len above {output_len}"
        )
    every = [gap for gaps in found for gap in gaps.every]
    quiet = [gap for gaps in found for gap in gaps.quiet]
    device = [each for one in rounds for each in one.device.steps]
    idle = [each for one in rounds for each in one.device.idle]
    steps = [_steps(each) for each in rounds]
    return {
        "steps": sum(counts),
        "first_token": max(gaps.seen for gaps in found),
        "step_ms_median": round(statistics.median(every) * 1e3, 3),
        "step_ms_p99": _p99_ms(every),
        "steps_disturbed": round(sum(counts) * (1 - len(quiet) / len(every)), 1),
        "step_ms_p99_undisturbed": _p99_ms(quiet) if quiet else None,
        "slowdown_max": _slowdown(rounds),
        "device_ms_median": round(statistics.median(device) * 1e3, 3) if device else None,
        "device_ms_p99": _p99_ms(device) if device else None,
        "device_idle_ms_p99": _p99_ms(idle) if idle else None,
        "p99_ms_of_rounds": [_p99_ms(gaps.every) for gaps in found],
        "slowest_of_rounds": [_slowest(each) for each in steps],
        "median_ms_of_quarters": _medians_of_quarters(steps),
        "step_ms_mean": round(statistics.fmean(every) * 1e3, 3),
        "tokens_merged": sum(gaps.merged for gaps in found),
    }


def _gaps(round_: Round) -> _Gaps:
    first, last = steady(round_.streams)
    every: list[float] = []
    quiet: list[float] = []
    merged = seen = 0
    for stream in round_.streams:
        within = [each for each in stream.arrivals if first <= each[0] <= last]
        for (before, _), (at, tokens) in itertools.pairwise(within):
            gap = [(at - before) / tokens] * tokens
            every += gap
            if not any(moment.begin < at and before < moment.end for moment in round_.slow):
                quiet += gap
            merged += tokens - 1
        seen = max(seen, sum(tokens for at, tokens in stream.arrivals if at < first))
    return _Gaps(len(every) // len(round_.streams), every, quiet, merged, seen)


def _slowdown(rounds: Sequence[Round]) -> float:
    """The worst while all streams decoded."""
    found = [1.0]
    for each in rounds:
        first, last = steady(each.streams)
        found += [slow.slowdown for slow in each.slow if slow.begin < last and first < slow.end]
    return round(max(found), 1)


def _steps(round_: Round) -> list[float]:
    """Milliseconds of a round's steps in their order, as its last stream saw them."""
    first, last = steady(round_.streams)
    stream = max(round_.streams, key=lambda each: each.arrivals[0][0])
    within = [each for each in stream.arrivals if first <= each[0] <= last]
    return [
        (at - before) / tokens * 1e3
        for (before, _), (at, tokens) in itertools.pairwise(within)
        for _ in range(tokens)
    ]


def _slowest(steps: list[float]) -> list[tuple[int, float]]:
    numbers = sorted(range(len(steps)), key=lambda number: -steps[number])
    return [(number, round(steps[number], 3)) for number in numbers[:_SLOWEST]]


def _medians_of_quarters(rounds: list[list[float]]) -> list[float | None]:
    quarters: list[list[float]] = [[], [], [], []]
    for steps in rounds:
        for number, step in enumerate(steps):
            quarters[4 * number // len(steps)].append(step)
    return [round(statistics.median(each), 3) if each else None for each in quarters]


def _p99_ms(gaps: list[float]) -> float:
    return round(sorted(gaps)[math.ceil(len(gaps) * 0.99) - 1] * 1e3, 3)
