"""Requests with every sampling parameter, for an engine on any device; and what is to come of them.

They arrive in chunks, are scored, sample, lose their slots and come back: by
blocks that went to host memory or were copied, and a history.  Each token and
each logprob is then compared with one forward pass of the CPU over the whole
sequence, with logits edited by a plain list of tokens (edit_reference.py).
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import msgspec
import numpy as np
import torch

from albireo.ipc.plan import (
    COPY_BLOCK,
    COPY_IN,
    COPY_OUT,
    MAX_TOP_LOGPROBS,
    TAKE_COUNTS,
    TAKE_LOGPROBS,
    TAKE_REQUEST,
    TAKE_SEED_LO,
    TAKE_TEMPERATURE,
    TAKE_TOP_P,
    Int32Array,
    PlanView,
    split64,
)
from albireo.workers.models.load import load_model

from ..plans import plan_of
from .asking import Asking
from .edit_reference import Ask, float_bits
from .engine_story import CONFIG, CPU_KERNELS, CUDA
from .paged_run import PagedRun
from .sampling_reference import Filters, draw, params_of, rows_of

SLOTS, BLOCKS, BLOCK_SIZE, LENGTH, BATCHED = 4, 24, 16, 64, 40
PARAMETERS = msgspec.structs.replace(
    CUDA, max_num_seqs=SLOTS, num_blocks=BLOCKS, block_size=BLOCK_SIZE, max_model_len=LENGTH,
    max_num_batched_tokens=BATCHED, num_swap_blocks=8,
)  # fmt: skip
Step = Callable[[PlanView, bool], Any]


@dataclass
class Player:
    """One request.  scored: tokens of its prompt, after the first.  records: by position."""

    number: int
    asking: Asking
    by: Filters
    seed: int
    logprobs: int
    scored: int
    slot: int = -1
    blocks: list[int] = field(default_factory=list)
    fed: int = 0
    first: int = 0
    """Tokens at the start."""
    failed: bool = False
    records: dict[int, Int32Array] = field(default_factory=dict)

    @property
    def tokens(self) -> list[int]:
        return self.asking.tokens

    def take_words(self, start: int) -> list[int]:
        words = self.asking.take_words(self.slot, start)
        words[TAKE_REQUEST] = self.number
        words[TAKE_SEED_LO : TAKE_SEED_LO + 2] = split64(self.seed)
        words[TAKE_TEMPERATURE], words[TAKE_TOP_P] = (
            float_bits(self.by.temperature), float_bits(self.by.top_p),
        )  # fmt: skip
        words[TAKE_LOGPROBS] = self.logprobs
        return words


class ParameterStory:
    """`count` requests, one after the other into a few slots; the same plans for every engine.

    outputs: tokens that each is to sample.  scores: most of a request's prompt
    that are scored.
    """

    def __init__(
        self, step: Step, count: int, seed: int, outputs: int = 14, scores: int = LENGTH
    ) -> None:
        self._step = step
        self._pick = random.Random(seed)
        self._outputs = outputs
        self._scores = scores
        self._free = list(range(BLOCKS))
        self._host: list[int] = []
        self.players = [self._player(number) for number in range(1, count + 1)]
        self._waiting = list(self.players)
        self._running: list[Player] = []
        self.moves = {COPY_OUT: 0, COPY_BLOCK: 0}
        """How often a request's blocks went through the host, and straight."""

    def play(self) -> list[list[int]]:
        """All requests to their end; the tokens of each."""
        while self._waiting or self._running:
            self._one_step()
        return [player.tokens for player in self.players]

    def _player(self, number: int) -> Player:
        pick, vocab = self._pick, CONFIG.vocab_size
        length = pick.randint(1, 40)
        tokens = [pick.randrange(vocab) for _ in range(length)]
        prompt_len = pick.choice((length, pick.randint(1, length)))
        ask = Ask()
        if number % 4 != 1:
            words = [[pick.randrange(vocab)] * pick.choice((1, 1, 2)) for _ in range(30)]
            ask = Ask(
                repetition=pick.choice((1.0, 1.5, 0.8)),
                presence=pick.choice((0.0, 0.7)),
                frequency=pick.choice((0.0, 0.4)),
                biases={pick.randrange(vocab): pick.uniform(-5, 5) for _ in range(9)},
                banned=tuple(pick.randrange(vocab) for _ in range(20)),
                min_tokens=length - prompt_len + pick.randint(0, 8),
                bad_words=tuple((*word[1:], pick.randrange(vocab)) for word in words),
                allowed=tuple(pick.sample(range(vocab), 20)) if number % 3 == 0 else (),
            )
        asking = Asking(tokens, prompt_len, ask)
        by = Filters(temperature=pick.choice((0.0, 1.0)), top_p=pick.choice((1.0, 0.8)))
        return Player(
            number, asking, by, pick.randrange(2**40), pick.choice((0, 1, 4, 21)),
            scored=pick.choice((0, min(asking.prompt_len - 1, self._scores))), first=length,
        )  # fmt: skip

    def _one_step(self) -> None:
        pick = self._pick
        rows: dict[str, list[Any]] = {name: [] for name in (
            "take", "append", "edit", "history", "history_token", "chunk", "chunk_token", "score",
            "decode", "copy",
        )}  # fmt: skip
        self._host = list(range(PARAMETERS.num_swap_blocks))
        sampling: list[Player] = []
        for player in list(self._running):
            if len(player.tokens) - player.fed == 1 and pick.random() < 0.1:
                self._move(player, rows)
        while self._waiting and len(self._running) < SLOTS and pick.random() < 0.7:
            player = self._waiting.pop(0)
            self._seat(player, rows, 0)
        decodes: list[Player] = []
        for player in self._running:
            left = len(player.tokens) - player.fed
            seated_now = any(words[TAKE_REQUEST] == player.number for words in rows["take"])
            if left == 1 and player.fed >= player.first and not seated_now:
                rows["decode"].append(player.slot)
                decodes.append(player)
                self._feed(player, 1, rows)
            elif length := min(left, pick.randint(1, 16), BATCHED - len(rows["chunk_token"]) - 4):
                self._chunk(player, length, rows)
                if length == left:
                    sampling.append(player)
        plan = plan_of(SLOTS, BATCHED, BLOCK_SIZE, LENGTH, **rows)
        self._read(self._step(plan, False), sampling + decodes, len(plan.score))

    def _seat(self, player: Player, rows: dict[str, list[Any]], start: int) -> None:
        taken = {other.slot for other in self._running}
        player.slot = self._pick.choice([slot for slot in range(SLOTS) if slot not in taken])
        player.fed = start
        self._running.append(player)
        rows["take"].append(player.take_words(start))
        rows["edit"] += player.asking.ask.edit_rows(player.slot)
        if start and player.asking.flags & TAKE_COUNTS:
            rows["history"].append([player.slot, 0, start])
            rows["history_token"] += player.tokens[:start]
        for index, block in enumerate(player.blocks):
            rows["append"].append([player.slot, index, block])

    def _move(self, player: Player, rows: dict[str, list[Any]]) -> None:
        """Its blocks are copied to others, through the host or not; it takes a slot again."""
        count = len(player.blocks)
        old, new = player.blocks, self._free[:count]
        if count > len(self._free) or count > len(self._host):
            return
        self._running.remove(player)
        player.blocks, self._free = new, [*self._free[count:], *old]
        kind = self._pick.choice(list(self.moves))
        self.moves[kind] += 1
        targets = new
        if kind == COPY_OUT:
            targets, self._host = self._host[:count], self._host[count:]
            rows["copy"] += [[COPY_IN, host, to] for host, to in zip(targets, new, strict=True)]
        copies = [[kind, block, to] for block, to in zip(old, targets, strict=True)]
        self._step(plan_of(SLOTS, BATCHED, BLOCK_SIZE, LENGTH, copy=copies), False)
        self._seat(player, rows, player.fed)

    def _feed(self, player: Player, length: int, rows: dict[str, list[Any]]) -> None:
        player.fed += length
        while len(player.blocks) * BLOCK_SIZE < player.fed:
            player.blocks.append(self._free.pop(0))
            rows["append"].append([player.slot, len(player.blocks) - 1, player.blocks[-1]])

    def _chunk(self, player: Player, length: int, rows: dict[str, list[Any]]) -> None:
        start, end = player.fed, player.fed + length
        first = len(rows["chunk_token"])
        rows["chunk"].append([player.slot, start, length, int(end == len(player.tokens))])
        rows["chunk_token"] += player.tokens[start:end]
        for position in range(start, min(end, player.scored)):
            rows["score"].append([first + position - start, player.tokens[position + 1]])
        self._feed(player, length, rows)

    def _read(self, result: Any, sampling: list[Player], scores: int) -> None:
        found = result.rows.tolist()
        assert [row[0] for row in found] == [player.number for player in sampling]
        asked = [p for p, row in zip(sampling, found, strict=True) if p.logprobs and row[1]]
        assert len(result.logprobs) == len(asked) + scores
        numbers = {player.number: player for player in self.players}
        for record in result.logprobs:
            numbers[record[0]].records[int(record[1])] = record
        for player, (_, count, token) in zip(sampling, found, strict=True):
            player.failed = not count
            if count:
                player.tokens.append(token)
            if not count or len(player.tokens) >= min(player.first + self._outputs, LENGTH - 1):
                self._running.remove(player)
                self._free += player.blocks


def expected_logits(story: ParameterStory) -> list[np.ndarray]:
    """Of every request, of all its tokens, by the CPU: [tokens, V] float32."""
    (model,) = load_model("", CONFIG, torch.float32, "dummy", 1, CPU_KERNELS, print)
    sequences = [player.tokens for player in story.players]
    run = PagedRun([model], CPU_KERNELS, torch.float32, sequences)
    return [logits.numpy() for logits in run.logits()]


def check_story(story: ParameterStory, most_wrong: int = 0) -> None:
    """Every token and logprob.  most_wrong: tokens that may differ, as logits do in last bits."""
    wrong, seen = [], 0
    for player, logits in zip(story.players, expected_logits(story), strict=True):
        asking = player.asking
        for at in range(player.first, len(player.tokens) + player.failed):
            before = replace(asking, tokens=player.tokens[:at], known=at)
            row = before.edited(logits[at - 1])
            params = params_of(player.by, seeds=[player.seed])
            token = int(draw(row[None], rows_of([0], [at]), params)[0])
            found = player.tokens[at] if at < len(player.tokens) else -1
            wrong += [(player.number, at, found, token)] * (found != token)
            seen += 1
        _check_records(player, logits)
    assert len(wrong) <= most_wrong, (wrong, seen)


def _check_records(player: Player, logits: np.ndarray) -> None:
    sampled = range(player.first, len(player.tokens))
    scored = range(1, player.scored + 1)
    assert set(player.records) == {*(sampled if player.logprobs else ()), *scored}
    for at, record in player.records.items():
        row = logits[at - 1].astype(np.float64)
        normal = np.logaddexp.reduce(row)
        token = player.tokens[at]
        floats = record.view(np.float32)
        assert abs(floats[2] - (row[token] - normal)) < 1e-3
        near = 1e-4
        assert (row > row[token] + near).sum() < record[3] <= 1 + (row > row[token] - near).sum()
        best = MAX_TOP_LOGPROBS if at in scored else player.logprobs - 1
        ids = record[4 : 4 + best]
        values = floats[4 + MAX_TOP_LOGPROBS : 4 + MAX_TOP_LOGPROBS + best]
        np.testing.assert_allclose(values, row[ids] - normal, atol=1e-3)
        np.testing.assert_allclose(values, np.sort(row)[::-1][:best] - normal, atol=1e-3)
