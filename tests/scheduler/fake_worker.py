"""A worker that carries out plans one position at a time, and refuses what is wrong in them.

It keeps per place in the cache which token was written there and after which
ones, in device and host blocks, and attends to nothing else.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field

import numpy as np

from albireo.ipc.plan import (
    COPY_IN,
    COPY_OUT,
    ROW_WORDS,
    TAKE_COUNTS,
    TAKE_EDITS,
    TAKE_FLAGS,
    TAKE_GRAMMAR,
    TAKE_PROMPT_LEN,
    TAKE_REQUEST,
    TAKE_SEED_LO,
    TAKE_SLOT,
    TAKE_START,
    PlanView,
)

from .submissions import token_at


def chain(seed: int, length: int) -> list[int]:
    """For each position what its keys and values depend on: all tokens up to it."""
    links, link = [], 0
    for position in range(length):
        link = hash((link, token_at(seed, position)))
        links.append(link)
    return links


@dataclass
class WorkerSlot:
    """What a worker knows of a slot.  take: a number of its own for each time it is taken.

    told: how often each position's token came, where penalties need them all.
    """

    take: int
    request: int
    seed: int
    prompt_len: int
    position: int
    counts: bool
    edits: bool
    last_token: int = -1
    link: int = 0
    table: dict[int, int] = field(default_factory=dict)
    told: Counter[int] = field(default_factory=Counter)
    edited: list[tuple[int, ...]] = field(default_factory=list)


class FakeWorker:
    """Carries out plans as the real one does, one position at a time, and looks hard.

    kv, host: (block, place in it) -> link, the token and all before it, as a number.
    scored: request -> prompt positions whose tokens were scored.
    """

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.slots: dict[int, WorkerSlot] = {}
        self.kv: dict[tuple[int, int], int] = {}
        self.host: dict[tuple[int, int], int] = {}
        self.poisoned: set[int] = set()
        self.scored: defaultdict[int, list[int]] = defaultdict(list)
        self._takes = 0

    def step(self, plan: PlanView) -> np.ndarray:
        """The rows of a plan's result."""
        for kind, source, target in plan.copy.tolist():
            read = self.host if kind == COPY_IN else self.kv
            write = self.host if kind == COPY_OUT else self.kv
            for place in range(self.block_size):
                write[target, place] = read.get((source, place), 0)
        for words in plan.take:
            self._take(words)
        for slot, index, block in plan.append.tolist():
            table = self.slots[slot].table
            assert index == len(table), f"slot {slot}: entry {index} after {len(table)} entries"
            table[index] = block
        for slot, *edit in plan.edit.tolist():
            self.slots[slot].edited.append(tuple(edit))
        at = 0
        for slot, start, length in plan.history.tolist():
            state = self.slots[slot]
            assert state.counts, "history for a slot that does not count"
            for offset, token in enumerate(plan.history_token[at : at + length].tolist()):
                self._tell(state, start + offset, token)
            at += length
        assert at == len(plan.history_token)
        for state in self.slots.values():
            if state.position and not state.link:
                state.link = chain(state.seed, state.position)[-1]
        rows = self._chunks(plan)
        for slot in plan.decode.tolist():
            state = self.slots[slot]
            self._write(state, state.last_token)
            rows.append(self._sample(state))
        return np.array(rows, dtype=np.int32).reshape(-1, ROW_WORDS)

    def _take(self, words: np.ndarray) -> None:
        self._takes += 1
        flags = int(words[TAKE_FLAGS])
        self.slots[int(words[TAKE_SLOT])] = WorkerSlot(
            self._takes,
            int(words[TAKE_REQUEST]),
            int(words[TAKE_SEED_LO]),
            int(words[TAKE_PROMPT_LEN]),
            int(words[TAKE_START]),
            bool(flags & (TAKE_COUNTS | TAKE_GRAMMAR)),
            bool(flags & TAKE_EDITS),
        )

    def _chunks(self, plan: PlanView) -> list[tuple[int, int, int]]:
        rows = []
        score = dict(plan.score.tolist())
        assert len(score) == len(plan.score)
        at = 0
        for slot, start, length, samples in plan.chunk.tolist():
            state = self.slots[slot]
            assert start == state.position, f"slot {slot} is at {state.position}, not {start}"
            assert length > 0
            for row in range(at, at + length):
                self._tell(state, state.position, int(plan.chunk_token[row]))
                self._write(state, int(plan.chunk_token[row]))
                if row in score:
                    assert score.pop(row) == token_at(state.seed, state.position)
                    self.scored[state.request].append(state.position)
            at += length
            if samples:
                rows.append(self._sample(state))
        assert at == len(plan.chunk_token)
        assert not score
        return rows

    def _tell(self, state: WorkerSlot, position: int, token: int) -> None:
        assert token == token_at(state.seed, position)
        state.told[position] += 1

    def _write(self, state: WorkerSlot, token: int) -> None:
        block = state.table[state.position // self.block_size]
        state.link = hash((state.link, token))
        self.kv[block, state.position % self.block_size] = state.link
        state.position += 1

    def _sample(self, state: WorkerSlot) -> tuple[int, int, int]:
        for position, link in enumerate(chain(state.seed, state.position)):
            place = (state.table[position // self.block_size], position % self.block_size)
            assert self.kv.get(place) == link, f"{place} does not hold position {position}"
        if state.counts:
            assert state.told == dict.fromkeys(range(state.position), 1)
        assert state.edits == bool(state.edited)
        state.last_token = token_at(state.seed, state.position)
        self._tell(state, state.position, state.last_token)
        if state.request in self.poisoned:
            return state.request, 0, 0
        return state.request, 1, state.last_token
