"""When requests are sent: at a rate, so many at once at most, and to the end of the last one."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence

import msgspec

from .connection import Answer, Connections


class LoadOptions(msgspec.Struct, frozen=True, kw_only=True):
    """request_rate: arrivals a second; infinity = all at once.
    burstiness: 1 = Poisson arrivals, below it in bursts, above it more even.
    max_concurrency: requests at once; one that has to wait for others begins when it is sent.
    """

    request_rate: float = math.inf
    burstiness: float = 1.0
    max_concurrency: int | None = None
    timeout_s: float = 3600.0
    seed: int = 0


async def run_load(
    connections: Connections,
    requests: Sequence[bytes],
    options: LoadOptions,
    on_end: Callable[[Answer], None],
) -> list[tuple[float, Answer]]:
    """Sends all requests; for each when it was due (time.perf_counter()), and its answer."""
    room: contextlib.AbstractAsyncContextManager[object] = contextlib.nullcontext()
    if options.max_concurrency is not None:
        room = asyncio.Semaphore(options.max_concurrency)

    async def ask(request: bytes, due: float) -> tuple[float, Answer]:
        async with room:
            answer = await connections.ask(request, options.timeout_s)
        on_end(answer)
        return due, answer

    tasks = []
    began = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for request, at in zip(requests, arrivals(options), strict=False):
            due = began + at
            if (wait_s := due - time.perf_counter()) > 0:
                await asyncio.sleep(wait_s)
            tasks.append(group.create_task(ask(request, due)))
    return [task.result() for task in tasks]


def arrivals(options: LoadOptions) -> Iterator[float]:
    """Seconds since the beginning, without end: gaps are gamma-distributed, of mean 1 / rate."""
    rng = random.Random(options.seed)
    at = 0.0
    while True:
        yield at
        if math.isfinite(options.request_rate):
            scale = 1 / (options.request_rate * options.burstiness)
            at += rng.gammavariate(options.burstiness, scale)
