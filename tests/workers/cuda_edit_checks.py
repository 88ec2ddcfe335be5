"""Checks of the GPU's edits and logprobs, for the interpreter and for a real GPU.

Requests come, bring their tokens in histories and chunks, sample, go and come
again; after each step the tables on the device are what a plain list of tokens
says, and so are edited logits.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from albireo.ipc.plan import TAKE_ALLOWS, TAKE_COUNTS, TAKE_FLAGS, PlanView
from albireo.workers.engine.cuda import apply_plan
from albireo.workers.engine.cuda.edit_state import keep_edits
from albireo.workers.engine.cuda.gather import gather_mixed
from albireo.workers.engine.cuda.mixed_sizes import size_of
from albireo.workers.engine.cuda.slot_tables import SlotTables
from albireo.workers.sampling.cuda.edit_tables import IN_PROMPT, NEWEST
from albireo.workers.sampling.cuda.edits import edit

from ..plans import plan_of
from .asking import Asking
from .edit_reference import Ask

SLOTS, BATCHED, BLOCK_SIZE, MAX_LEN = 5, 64, 16, 160


class Story:
    """Random requests on the tables of one rank; `ranks` shards of `vocab` tokens."""

    def __init__(self, seed: int, vocab: int, device: str, rank: int = 0, ranks: int = 1) -> None:
        self.pick = random.Random(seed)
        self.vocab = vocab
        self.first = rank * (vocab // ranks)
        self.last = self.first + vocab // ranks
        self.device = device
        self.tables = SlotTables(
            SLOTS, SLOTS, MAX_LEN // BLOCK_SIZE, BATCHED, BLOCK_SIZE,
            self.last - self.first, self.first, torch.device(device),
        )  # fmt: skip
        self.askings: dict[int, Asking] = {}

    def asking(self) -> Asking:
        """With or without each parameter; few different tokens, so that they come again."""
        pick = self.pick
        length = pick.randint(1, 70)
        tokens = [self._token() for _ in range(length)]
        # A request that is resumed has output among its first tokens.
        prompt_len = pick.choice((length, pick.randint(1, length)))
        ask: dict[str, Any] = {}
        if pick.random() < 0.6:
            ask["repetition"] = pick.choice((1.0, 1.3, 0.8))
            ask["presence"] = pick.choice((0.0, 0.7, -1.5))
            ask["frequency"] = pick.choice((0.0, 0.3))
        if pick.random() < 0.5:
            ask["biases"] = {self._token(): pick.uniform(-100, 100) for _ in range(6)}
        if pick.random() < 0.3:
            ask["allowed"] = tuple({self._token() for _ in range(pick.randint(1, 40))})
        if pick.random() < 0.4:
            # A token may have a bias and a ban.
            ask["banned"] = (self._token(), *list(ask.get("biases", ()))[:1])
            ask["min_tokens"] = length - prompt_len + pick.randint(0, 20)
        if pick.random() < 0.5:
            words = (self._word(tokens[prompt_len:]) for _ in range(pick.randint(1, 5)))
            ask["bad_words"] = tuple(words)
        return Asking(tokens, prompt_len, Ask(**ask))

    def _token(self) -> int:
        return self.pick.choice((self.pick.randrange(self.vocab), self.pick.randrange(4)))

    def _word(self, output: list[int]) -> tuple[int, ...]:
        """Of 1 to 16 tokens, often the newest output's, so that its end has to be banned."""
        length = self.pick.choice((1, 2, 3, 16))
        end = output[-(length - 1) :] if length > 1 else []
        if len(end) < length - 1 or self.pick.random() < 0.3:
            end = [self.pick.randrange(4) for _ in range(length - 1)]
        return (*end, self.pick.randrange(self.vocab))

    def step(self) -> None:
        """One plan, carried out; logits edited, a token sampled for each row, tables checked."""
        pick = self.pick
        take, edits, history, history_token, chunk, tokens, decode = [], [], [], [], [], [], []
        for slot in range(SLOTS - 1):  # Room for a row of padding.
            asking = self.askings.get(slot)
            if asking is None or len(asking.tokens) > 100 or pick.random() < 0.1:
                asking = self.askings[slot] = self.asking()
                start = pick.choice((0, pick.randrange(len(asking.tokens))))
                take.append(asking.take_words(slot, start))
                edits += asking.ask.edit_rows(slot)
                if start and asking.flags & TAKE_COUNTS:
                    history.append([slot, 0, start])
                    history_token += asking.tokens[:start]
                asking.fed = asking.known = start
            elif pick.random() < 0.2:
                continue
            left = len(asking.tokens) - asking.fed
            if asking.fed == asking.known - 1:
                decode.append(slot)
                asking.fed += 1
            elif length := min(left, pick.randint(1, 40), BATCHED - len(tokens)):
                chunk.append([slot, asking.fed, length, int(length == left)])
                tokens += asking.tokens[asking.fed : asking.fed + length]
                asking.fed += length
                asking.known = asking.fed
        plan = plan_of(
            SLOTS, BATCHED, BLOCK_SIZE, MAX_LEN, take=take, edit=edits, history=history,
            history_token=history_token, chunk=chunk, chunk_token=tokens, decode=decode,
        )  # fmt: skip
        sampling = [slot for slot, _, _, samples in chunk if samples]
        self._carry_out(plan, len(sampling))
        self._sample(sampling + decode, len(chunk) + len(decode))
        self._check_tables()

    def _carry_out(self, plan: PlanView, sampling: int) -> None:
        """As StepParts, with flags as SlotNeeds would give them."""
        tables = self.tables
        tables.words[: len(plan.words)] = torch.from_numpy(plan.words.copy()).to(self.device)
        apply_plan.apply(tables)
        counted = any(
            self.askings[int(row[0])].flags & TAKE_COUNTS for row in (*plan.history, *plan.chunk)
        )
        keep_edits(tables, plan, bool(plan.take[:, TAKE_FLAGS].any()), counted)
        gather_mixed(tables, size_of(plan, sampling + len(plan.decode)))

    def _sample(self, slots: list[int], sequences: int) -> None:
        """Edits logits of rows of these slots, padded by the dummy, checks them, draws tokens."""
        tables, rows = self.tables, len(slots)
        numbers = np.random.default_rng(self.pick.randrange(1 << 30))
        logits = numbers.normal(0, 4, (rows + 1, self.vocab)).astype(np.float32)
        logits[:, numbers.integers(self.vocab, size=3)] = -np.inf
        shard = torch.from_numpy(logits[:, self.first : self.last].copy()).to(self.device)
        tables.sample_slots[rows] = tables.dummy_slot
        edit(shard, tables.sample_slots[: rows + 1], tables.draw_position[: rows + 1], tables.edits)
        found = shard.cpu().numpy()
        for row, slot in enumerate(slots):
            expected = self.askings[slot].edited(logits[row])[self.first : self.last]
            assert np.array_equal(found[row], expected), (slot, self.askings[slot])
        assert np.array_equal(found[rows], logits[rows, self.first : self.last])
        tokens = [self._token() if self.pick.random() < 0.95 else -1 for _ in slots]
        tables.sampled[:rows] = torch.tensor(tokens, dtype=torch.int32)
        apply_plan.advance(tables, sequences, rows)
        for slot, token in zip(slots, tokens, strict=True):
            if token < 0:  # The request ends.
                del self.askings[slot]
            else:
                self.askings[slot].tokens.append(token)
                self.askings[slot].known += 1

    def _check_tables(self) -> None:
        edits = self.tables.edits
        counts, newest = edits.counts.cpu().numpy(), edits.newest.cpu().numpy()
        seen, num_seen = edits.seen.cpu().numpy(), edits.num_seen.cpu().numpy()
        allowed = np.unpackbits(
            edits.allowed.cpu().numpy().view(np.uint8), axis=1, bitorder="little"
        )
        for slot, asking in self.askings.items():
            if not asking.flags:
                continue
            if asking.flags & TAKE_COUNTS:
                known = asking.tokens[: asking.known]
                prompt, output = known[: asking.prompt_len], known[asking.prompt_len :]
                expected = dict.fromkeys(self._mine(prompt), IN_PROMPT)
                for token, count in Counter(output).items():
                    if self.first <= token < self.last:
                        expected[token] = expected.get(token, 0) + count
                listed = seen[slot, : num_seen[slot]].tolist()
                assert sorted(listed) == np.flatnonzero(counts[slot]).tolist()
                assert {self.first + t: counts[slot, t] for t in listed} == expected
                for position in range(max(asking.prompt_len, asking.known - NEWEST), asking.known):
                    assert newest[slot, position % NEWEST] == asking.tokens[position]
            if asking.flags & TAKE_ALLOWS:
                assert self._tokens(allowed[slot]) == self._mine(asking.ask.allowed)

    def _tokens(self, bits: np.ndarray) -> set[int]:
        return {self.first + int(token) for token in np.flatnonzero(bits)}

    def _mine(self, tokens: Iterable[int]) -> set[int]:
        return {token for token in tokens if self.first <= token < self.last}
