"""Drives an Engine as a scheduler would: requests in, plans made by hand, tokens out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from albireo.ipc.config import EngineConfig
from albireo.ipc.plan import PlanView, plan_bytes, split64, write_plan
from albireo.workers.engine.step import StepResult

ENGINE = EngineConfig(
    model_path="",
    device="cpu",
    dtype="float32",
    load_format="dummy",
    tp=1,
    max_model_len=64,
    block_size=4,
    num_blocks=64,
    max_num_seqs=6,
    max_num_batched_tokens=64,
    lookahead=1,
    batch_invariant=False,
    step_timeout_s=30.0,
    spin_us=0,
    sim_step_ms=0.0,
)

Step = Callable[[PlanView, bool], StepResult]


@dataclass
class Request:
    """`tokens` is prompt and answer; `cached` of them are in the slot's cache."""

    number: int
    tokens: list[int]
    slot: int
    blocks: list[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    cached: int = 0
    appended: int = 0


@dataclass
class Driver:
    """Steps of one engine; `step` is Engine.step, or calls it on every rank; `engine` its sizes."""

    step: Step
    engine: EngineConfig = ENGINE
    requests: dict[int, Request] = field(default_factory=dict)

    def run(
        self,
        take: list[Request] | None = None,
        chunk: list[tuple[Request, int]] | None = None,
        decode: list[Request] | None = None,
    ) -> list[list[int]]:
        """One step: new requests, chunks of a length, decodes.  Returns the result rows."""
        chunk, decode = chunk or [], decode or []
        takes, appends, chunks, tokens = [], [], [], []
        for request in take or []:
            self.requests[request.number] = request
            takes.append(_take_words(request))
        for request, length in chunk:
            start, end = request.cached, request.cached + length
            chunks.append([request.slot, start, length, int(end == len(request.tokens))])
            tokens += request.tokens[start:end]
            appends += self._new_blocks(request, end)
        for request in decode:
            assert request.cached == len(request.tokens) - 1
            appends += self._new_blocks(request, request.cached + 1)
        plan = self._plan(takes, appends, chunks, tokens, [request.slot for request in decode])
        rows = self.step(plan, False).rows.tolist()
        for request, length in [*chunk, *((request, 1) for request in decode)]:
            request.cached += length
        for number, count, token in rows:
            if count:
                self.requests[number].tokens.append(token)
        return rows

    def generate(self, request: Request, count: int, max_chunk: int = 64) -> list[int]:
        """Runs one request alone from its start; returns its `count` new tokens."""
        prompt_len = len(request.tokens)
        take = [request]
        while request.cached < prompt_len:
            length = min(max_chunk, prompt_len - request.cached)
            self.run(take=take, chunk=[(request, length)])
            take = []
        while len(request.tokens) < prompt_len + count:
            self.run(decode=[request])
        return request.tokens[prompt_len:]

    def _new_blocks(self, request: Request, length: int) -> list[list[int]]:
        needed = -(-length // self.engine.block_size)
        new = [[request.slot, i, request.blocks[i]] for i in range(request.appended, needed)]
        request.appended = max(request.appended, needed)
        return new

    def _plan(
        self,
        take: list[list[int]],
        append: list[list[int]],
        chunk: list[list[int]],
        chunk_token: list[int],
        decode: list[int],
    ) -> PlanView:
        frame = memoryview(
            bytearray(
                plan_bytes(
                    self.engine.max_num_seqs,
                    self.engine.max_num_batched_tokens,
                    self.engine.block_size,
                )
            )
        )
        write_plan(
            frame,
            0,
            0,
            np.array(take, np.int32).reshape(-1, 10),
            np.array(append, np.int32).reshape(-1, 3),
            np.array(chunk, np.int32).reshape(-1, 4),
            np.array(chunk_token, np.int32),
            np.array(decode, np.int32),
        )
        return PlanView(frame)


def _take_words(request: Request) -> list[int]:
    bits = [int(np.float32(value).view(np.int32)) for value in (request.temperature, request.top_p)]
    return [
        request.slot,
        request.number,
        *split64(request.seed),
        bits[0],
        0,
        bits[1],
        0,
        len(request.tokens),
        0,
    ]
