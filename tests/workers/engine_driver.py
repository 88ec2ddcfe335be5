"""Drives an Engine as a scheduler would: requests in, plans made by hand, tokens out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec
import numpy as np

from albireo.ipc.config import EngineConfig
from albireo.ipc.plan import (
    TAKE_FLAGS,
    TAKE_GRAMMAR,
    TAKE_LOGPROBS,
    TAKE_MIN_P,
    TAKE_REQUEST,
    TAKE_SEED_HI,
    TAKE_SEED_LO,
    TAKE_SLOT,
    TAKE_START,
    TAKE_TEMPERATURE,
    TAKE_TOP_K,
    TAKE_TOP_P,
    TAKE_WORDS,
    PlanView,
    split64,
)
from albireo.workers.engine.step import StepResult

from .. import specs
from ..plans import plan_of
from .edit_reference import Ask, float_bits

ENGINE = msgspec.structs.replace(
    specs.ENGINE, device="cpu", block_size=4, max_num_seqs=6, step_timeout_s=30.0
)

NOTHING_ASKED = Ask()

Step = Callable[[PlanView, bool], StepResult]


@dataclass
class Request:
    """`tokens` is prompt and answer; `cached` of them are in the slot's cache.

    resumed: tokens of them that are no prompt.  logprobs: of how many best tokens; None: none.
    """

    number: int
    tokens: list[int]
    slot: int
    blocks: list[int]
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    top_k: int = 0
    min_p: float = 0.0
    ask: Ask = NOTHING_ASKED
    logprobs: int | None = None
    scored: bool = False
    resumed: int = 0
    grammar: str = ""
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
        copy: list[tuple[int, int, int]] | None = None,
    ) -> list[list[int]]:
        """One step: new requests, chunks of a length, decodes.  Returns the result rows.

        A new request with `cached` tokens brings them as its history.
        """
        chunk, decode = chunk or [], decode or []
        takes, appends, chunks, tokens = [], [], [], []
        edits, history, history_tokens, scores = [], [], [], []
        grammars, grammar_words = [], []
        for request in take or []:
            self.requests[request.number] = request
            takes.append(_take_words(request))
            edits += request.ask.edit_rows(request.slot)
            if request.grammar:
                text = request.grammar.encode()
                grammars.append([request.slot, len(text)])
                padded = text + bytes(-len(text) % 4)
                grammar_words += np.frombuffer(padded, np.int32).tolist()
            if request.cached:
                history.append([request.slot, 0, request.cached])
                history_tokens += request.tokens[: request.cached]
                appends += self._new_blocks(request, request.cached)
        for request, length in chunk:
            start, end = request.cached, request.cached + length
            chunks.append([request.slot, start, length, int(end == len(request.tokens))])
            if request.scored:
                ends = min(end, len(request.tokens) - request.resumed - 1)
                scores += [
                    [len(tokens) + at - start, request.tokens[at + 1]] for at in range(start, ends)
                ]
            tokens += request.tokens[start:end]
            appends += self._new_blocks(request, end)
        for request in decode:
            assert request.cached == len(request.tokens) - 1
            appends += self._new_blocks(request, request.cached + 1)
        plan = plan_of(
            self.engine.max_num_seqs,
            self.engine.max_num_batched_tokens,
            self.engine.block_size,
            self.engine.max_model_len,
            take=takes,
            append=appends,
            chunk=chunks,
            chunk_token=tokens,
            decode=[request.slot for request in decode],
            edit=edits,
            history=history,
            history_token=history_tokens,
            grammar=grammars,
            grammar_word=grammar_words,
            score=scores,
            copy=copy or [],
        )
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


def _take_words(request: Request) -> list[int]:
    words = [0] * TAKE_WORDS
    words[TAKE_SLOT], words[TAKE_REQUEST] = request.slot, request.number
    words[TAKE_SEED_LO], words[TAKE_SEED_HI] = split64(request.seed)
    words[TAKE_TEMPERATURE] = float_bits(request.temperature)
    words[TAKE_TOP_K] = request.top_k
    words[TAKE_TOP_P], words[TAKE_MIN_P] = float_bits(request.top_p), float_bits(request.min_p)
    words[TAKE_START] = request.cached
    words[TAKE_LOGPROBS] = 0 if request.logprobs is None else 1 + request.logprobs
    request.ask.write_take(words, len(request.tokens) - request.resumed)
    words[TAKE_FLAGS] |= TAKE_GRAMMAR if request.grammar else 0
    return words
