"""Many streaming HTTP clients in one process of their own, for `albireo bench gateway`.

    python -m albireo.bench.http_streams <JSON of Plan>

It runs the warm-up, says "ready" on standard output, waits for a line on standard
input, runs the streams, and prints a JSON object: Streamed.
"""

from __future__ import annotations

import asyncio
import sys
import time

import msgspec
import numpy as np
import uvloop

from .machine import spare_the_collector
from .serving.connection import Answer, Connections, Target
from .serving.figures import times

_TIMEOUT_S = 300.0


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    target: Target
    model: str
    chat: bool
    streams: int
    tokens: int
    warm_up_tokens: int


class Streamed(msgspec.Struct, frozen=True, kw_only=True):
    """events: chunks with text; tokens: what the usage chunks say.  cpu_s: of this process."""

    wall_s: float
    cpu_s: float
    events: int
    tokens: int
    ttft_ms_median: float
    itl_ms_median: float
    itl_ms_p99: float
    itl_ms_max: float


def main() -> None:
    uvloop.run(_run(msgspec.json.decode(sys.argv[1], type=Plan)))


async def _run(plan: Plan) -> None:
    connections = Connections(plan.target)
    await _streams(connections, plan, plan.warm_up_tokens)
    print("ready", flush=True)
    await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)
    spare_the_collector()
    cpu = time.process_time()
    began = time.perf_counter()
    answers = await _streams(connections, plan, plan.tokens)
    wall_s = time.perf_counter() - began
    cpu_s = time.process_time() - cpu
    found = times(answers)
    gaps_ms = np.asarray(found["itl"]) * 1e3
    result = Streamed(
        wall_s=wall_s,
        cpu_s=cpu_s,
        events=sum(each.events for each in answers),
        tokens=sum(each.new_tokens for each in answers),
        ttft_ms_median=float(np.median(found["ttft"])) * 1e3,
        itl_ms_median=float(np.median(gaps_ms)),
        itl_ms_p99=float(np.percentile(gaps_ms, 99)),
        itl_ms_max=float(gaps_ms.max()),
    )
    print(msgspec.json.encode(result).decode(), flush=True)


async def _streams(connections: Connections, plan: Plan, tokens: int) -> list[Answer]:
    """All streams at once, to their ends.  Raises RuntimeError with what the server said."""
    request = _request(plan, tokens)
    asked = (connections.ask(request, _TIMEOUT_S) for _ in range(plan.streams))
    answers = await asyncio.gather(*asked)
    errors = [each.error for each in answers if each.error is not None]
    if errors:
        raise RuntimeError(f"{len(errors)} of {plan.streams} streams failed: {errors[0]}")
    return answers


def _request(plan: Plan, tokens: int) -> bytes:
    body: dict[str, object] = {
        "model": plan.model, "max_tokens": tokens, "ignore_eos": True, "stream": True,
        "stream_options": {"include_usage": True},
    }  # fmt: skip
    if plan.chat:
        body["messages"] = [{"role": "user", "content": "Hello"}]
    else:
        body["prompt"] = list(range(16))
    path = "/v1/chat/completions" if plan.chat else "/v1/completions"
    return plan.target.request("POST", path, msgspec.json.encode(body))


if __name__ == "__main__":
    main()
