"""`albireo bench runtime`: what the path around the model can carry.

The `sim` device needs a set time for a step whatever the batch, and makes
tokens by a formula.  One client keeps `batch` streams open, receives every
token through scheduler, rings, detokenizer and router, and checks each against
the formula.
"""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import msgspec
import uvloop

from albireo.client import AlbireoError, AsyncClient, Delta, SamplingParams
from albireo.ipc.simulated import sim_token
from albireo.node.options import NodeOptions

from .machine import cpu_seconds, machine, spare_the_collector
from .nodes import BenchError, running_node

_WARM_UP_TOKENS = 40
_PROMPT_LEN = 16
_LAST_REPORT_S = 0.2
"""For the scheduler's report of the end, which status shows, to arrive."""


class _Stream:
    """One request: receives its tokens, and checks them against the formula."""

    __slots__ = ("_left", "_position", "_seed", "_vocab", "ended", "wrong")

    def __init__(self, seed: int, tokens: int, vocab: int) -> None:
        self._seed = seed
        self._left = tokens
        self._position = _PROMPT_LEN
        self._vocab = vocab
        self.ended = asyncio.Event()
        self.wrong: str | None = None

    def receive(self, reply: Delta | AlbireoError) -> None:
        if not isinstance(reply, Delta):
            self.wrong = str(reply)
            self.ended.set()
            return
        for token in reply.token_ids:
            if token != sim_token(self._seed, self._position, self._vocab):
                self.wrong = f"token {token} at position {self._position} is not the formula's"
            self._position += 1
            self._left -= 1
        if reply.end is not None:
            if self._left:
                self.wrong = f"{self._left} tokens are missing at the end"
            self.ended.set()


def bench_runtime(options: NodeOptions, batch: int, tokens: int) -> dict[str, Any]:
    """Runs a node with `options` (device sim) and one client with `batch` streams of `tokens`.

    Raises BenchError when a token is wrong or missing.
    """
    options = msgspec.structs.replace(options, device="sim", max_num_seqs=max(batch, 1))
    with running_node(options) as node:
        return uvloop.run(_measure(node, options, batch, tokens))


async def _measure(node: str, options: NodeOptions, batch: int, tokens: int) -> dict[str, Any]:
    async with await AsyncClient.connect(node=node) as client:
        await _run_streams(client, batch, _WARM_UP_TOKENS)
        await asyncio.sleep(_LAST_REPORT_S)
        spare_the_collector()
        before = await _usage(client)
        client_before = time.process_time()
        began = time.monotonic()
        await _run_streams(client, batch, tokens)
        wall_s = time.monotonic() - began
        client_cpu_s = time.process_time() - client_before
        await asyncio.sleep(_LAST_REPORT_S)
        after = await _usage(client)
    steps = after["steps"] - before["steps"]
    cpu = {name: after["cpu"][name] - before["cpu"][name] for name in after["cpu"]}
    cpu["(client)"] = client_cpu_s
    return {
        "bench": "runtime",
        "machine": machine(),
        "groups": list(options.groups),
        "batch": batch,
        "tokens_per_stream": tokens,
        "step_ms": options.sim_step_ms,
        "async_scheduling": options.async_scheduling,
        "journal": options.journal is not None,
        "wall_s": round(wall_s, 3),
        "steps": steps,
        "ms_per_step": round(wall_s / steps * 1e3 * len(options.groups), 3),
        "tokens_per_s": round(batch * tokens / wall_s),
        "tokens_checked": batch * tokens,
        "cpu_ms_per_step": {n: round(s / steps * 1e3, 3) for n, s in cpu.items()},
        "cpu_share_of_a_core": {n: round(s / wall_s, 3) for n, s in cpu.items()},
    }


async def _run_streams(client: AsyncClient, batch: int, tokens: int) -> None:
    """`batch` requests at once; returns when the last has ended."""
    vocab = client.welcome.vocab_size
    rng = random.Random(0)
    streams = []
    for _ in range(batch):
        seed = rng.randrange(2**31)
        stream = _Stream(seed, tokens, vocab)
        prompt = [rng.randrange(vocab) for _ in range(_PROMPT_LEN)]
        params = SamplingParams(max_tokens=tokens, ignore_eos=True, seed=seed)
        client.submit(prompt, stream.receive, params)
        streams.append(stream)
    for stream in streams:
        await stream.ended.wait()
    wrong = [stream.wrong for stream in streams if stream.wrong]
    if wrong:
        raise BenchError(f"{len(wrong)} of {batch} streams went wrong; the first: {wrong[0]}")


async def _usage(client: AsyncClient) -> dict[str, Any]:
    """CPU seconds of each actor so far, and steps of all groups."""
    tree = await client.status()
    return {
        "cpu": {actor["name"]: cpu_seconds(actor["pid"]) for actor in tree["actors"]},
        "steps": sum(g["scheduler"]["steps"] for g in tree["groups"] if g["scheduler"]),
    }
