"""Penalties, biases, bans and bad words against plain numpy, over random lives of slots."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest

from albireo.ipc.plan import (
    EDIT_BIAS,
    MAX_PLAN_EDITS,
    TAKE_FLAGS,
    TAKE_SLOT,
    TAKE_WORDS,
    PlanView,
)
from albireo.workers.sampling.draw import NOT_FINITE, NOTHING_ALLOWED
from albireo.workers.sampling.edits import NEWEST, SlotEdits
from albireo.workers.sampling.params import SampleRows

from ..plans import plan_of
from .edit_reference import Ask, random_ask
from .sampling_reference import Filters, draw, params_of, rows_of

SLOTS, VOCAB = 4, 97


def plan(**sections: object) -> PlanView:
    return plan_of(SLOTS, 200, 4, 400, **sections)  # type: ignore[arg-type]


@dataclass
class Sequence:
    """A request in a slot: what it asks for, its tokens, and how many of them were brought."""

    slot: int
    ask: Ask
    prompt: list[int]
    output: list[int] = field(default_factory=list)
    brought: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    def take(self) -> list[int]:
        words = [0] * TAKE_WORDS
        words[TAKE_SLOT] = self.slot
        self.ask.write_take(words, len(self.prompt))
        return words

    def bring(self, length: int) -> tuple[list[int], list[int]]:
        """A range of a chunk or a history, and its tokens."""
        start = self.brought
        self.brought += length
        return [self.slot, start, length], self.tokens[start : start + length]


def begin(edits: list[SlotEdits], *sequences: Sequence, history: int = 0, chunk: int = 64) -> None:
    """Takes, histories of `history` tokens, and chunks of at most `chunk` of what is left."""
    histories = [sequence.bring(min(history, len(sequence.tokens))) for sequence in sequences]
    first = plan(
        take=[sequence.take() for sequence in sequences],
        edit=[row for sequence in sequences for row in sequence.ask.edit_rows(sequence.slot)],
        history=[span for span, _ in histories],
        history_token=[token for _, tokens in histories for token in tokens],
    )
    for each in edits:
        each.apply_plan(first)
    while any(sequence.brought < len(sequence.tokens) for sequence in sequences):
        chunks = [s.bring(min(chunk, len(s.tokens) - s.brought)) for s in sequences]
        step = plan(
            chunk=[[*span, 0] for span, _ in chunks if span[2]],
            chunk_token=[token for _, tokens in chunks for token in tokens],
        )
        for each in edits:
            each.apply_plan(step)


def rows_for(*sequences: Sequence) -> SampleRows:
    return rows_of([s.slot for s in sequences], [len(s.tokens) for s in sequences])


def edited(shards: list[SlotEdits], logits: np.ndarray, rows: SampleRows) -> np.ndarray:
    """[R, V] through the shards of the vocabulary."""
    parts = np.array_split(np.array(logits, np.float32), len(shards), axis=1)
    parts = [np.ascontiguousarray(part) for part in parts]
    for each, part in zip(shards, parts, strict=True):
        if each.asked(rows):
            each.apply(part, rows)
    return np.concatenate(parts, axis=1)


def new_shards(count: int) -> list[SlotEdits]:
    widths = [len(part) for part in np.array_split(np.arange(VOCAB), count)]
    return [SlotEdits(SLOTS, width, sum(widths[:i])) for i, width in enumerate(widths)]


def some_tokens(choose: random.Random, count: int) -> list[int]:
    """Half of them of the few that bad words are made of."""
    return [choose.choice([choose.randrange(4), choose.randrange(VOCAB)]) for _ in range(count)]


@pytest.mark.parametrize("seed", range(30))
def test_rows_are_edited_as_numpy_edits_them_whatever_the_slots_lives(seed: int) -> None:
    choose = random.Random(seed)
    edits = new_shards(1 + seed % 3)
    running: dict[int, Sequence] = {}
    random_logits = np.random.default_rng(seed)
    for _ in range(8):
        for slot in range(SLOTS):
            if slot in running and choose.random() < 0.2:
                del running[slot]
            if slot not in running and choose.random() < 0.6:
                ask = random_ask(choose, VOCAB) if choose.random() < 0.8 else Ask()
                prompt = some_tokens(choose, choose.randrange(1, 30))
                # A resumed request comes with output.
                output = some_tokens(choose, choose.choice([0, 0, 5]))
                running[slot] = Sequence(slot, ask, prompt, output)
                history, chunk = choose.randrange(40), choose.randrange(1, 20)
                begin(edits, running[slot], history=history, chunk=chunk)
        sequences = list(running.values())
        if not sequences:
            continue
        rows = rows_for(*sequences)
        logits = random_logits.normal(0, 5, (len(sequences), VOCAB)).astype(np.float32)
        expected = [
            s.ask.edited(row, s.prompt, s.output) for s, row in zip(sequences, logits, strict=True)
        ]
        assert np.array_equal(edited(edits, logits, rows), np.array(expected))
        tokens = np.array(some_tokens(choose, len(sequences)), np.int32)
        for each in edits:
            each.count(rows, tokens)
        for sequence, token in zip(sequences, tokens.tolist(), strict=True):
            sequence.output.append(token)


FULL = Ask(
    repetition=1.3, presence=0.5, frequency=0.25, biases={3: 2.0, 90: -5.0}, banned=(1, 2),
    min_tokens=10, bad_words=((3,), (1, 2), (2, 2, 5)),
)  # fmt: skip


@pytest.mark.parametrize("history", [0, 1, 15, 24, 40])
@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_history_chunk_and_sampling_bring_the_same(history: int, chunk: int) -> None:
    choose = random.Random(history)
    prompt, output = some_tokens(choose, 20), some_tokens(choose, 20)
    sampled = Sequence(0, FULL, prompt)
    resumed = Sequence(1, FULL, prompt, output)
    edits = SlotEdits(SLOTS, VOCAB)
    begin([edits], sampled, resumed, history=history, chunk=chunk)
    for token in output:
        edits.count(rows_for(sampled), np.array([token], np.int32))
        sampled.output.append(token)
    logits = np.random.default_rng(1).normal(0, 5, VOCAB).astype(np.float32)
    rows = edited([edits], np.array([logits, logits]), rows_for(sampled, resumed))
    assert np.array_equal(rows[0], rows[1])
    assert np.array_equal(rows[0], FULL.edited(logits, prompt, output))


def test_a_row_that_failed_counts_nothing() -> None:
    edits = SlotEdits(SLOTS, VOCAB)
    sequence = Sequence(2, FULL, [1, 2, 3])
    begin([edits], sequence)
    edits.count(rows_for(sequence), np.array([NOT_FINITE], np.int32))
    logits = np.ones((1, VOCAB), np.float32)
    expected = FULL.edited(logits[0], sequence.prompt, [])
    assert np.array_equal(edited([edits], logits, rows_for(sequence))[0], expected)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_edits_do_not_hide_a_row_that_is_not_finite(bad: float) -> None:
    edits = SlotEdits(SLOTS, VOCAB)
    asks = (
        Ask(allowed=(5, 6)),
        Ask(banned=(7,), min_tokens=9),
        Ask(bad_words=((7,),)),
        Ask(biases={7: -100.0}, repetition=0.5, presence=2.0),
    )
    sequences = [Sequence(slot, ask, [7]) for slot, ask in enumerate(asks)]
    begin([edits], *sequences)
    logits = np.zeros((len(asks), VOCAB), np.float32)
    logits[:, 7] = bad
    rows = rows_for(*sequences)
    after = edited([edits], logits, rows)
    params = params_of(*[Filters()] * SLOTS)
    assert draw(after, rows, params).tolist() == [NOT_FINITE] * len(asks)


def test_a_row_of_which_nothing_is_left_fails_alone() -> None:
    edits = SlotEdits(SLOTS, VOCAB)
    nothing = Sequence(0, Ask(allowed=(5,), bad_words=((5,),)), [1])
    something = Sequence(1, Ask(allowed=(5, 6), bad_words=((5,),)), [1])
    begin([edits], nothing, something)
    rows = rows_for(nothing, something)
    logits = edited([edits], np.zeros((2, VOCAB)), rows)
    assert draw(logits, rows, params_of(Filters(), Filters())).tolist() == [NOTHING_ALLOWED, 6]


def test_a_plain_request_in_a_used_slot_is_left_alone() -> None:
    edits = SlotEdits(SLOTS, VOCAB)
    begin([edits], Sequence(0, FULL, [1, 2, 3], [4, 4]))
    plain = Sequence(0, Ask(), [1, 2])
    begin([edits], plain)
    assert edits.asked(rows_for(plain)) == 0
    again = Sequence(0, FULL, [9])
    begin([edits], again)
    logits = np.random.default_rng(2).normal(0, 5, (1, VOCAB)).astype(np.float32)
    assert np.array_equal(
        edited([edits], logits, rows_for(again))[0], FULL.edited(logits[0], [9], [])
    )


def test_a_bad_word_of_the_longest_length_is_banned_at_its_last_token() -> None:
    word = tuple(range(10, 10 + NEWEST))
    edits = SlotEdits(SLOTS, VOCAB)
    whole = Sequence(0, Ask(bad_words=(word,)), [1], [2, *word[:-1]])
    # The prompt's tokens are no part of it.
    half = Sequence(1, Ask(bad_words=(word,)), [2, *word[:3]], list(word[3:-1]))
    begin([edits], whole, half)
    logits = edited([edits], np.zeros((2, VOCAB)), rows_for(whole, half))
    assert np.flatnonzero(logits[0] == -np.inf).tolist() == [word[-1]]
    assert not (logits[1] == -np.inf).any()


def test_more_edits_than_a_slot_holds_are_refused() -> None:
    edits = SlotEdits(1, VOCAB)
    words = [0] * TAKE_WORDS
    words[TAKE_FLAGS] = 2
    edits.apply_plan(plan(take=[words], edit=[[0, EDIT_BIAS, 0, 0]] * MAX_PLAN_EDITS))
    with pytest.raises(ValueError, match="more than 8192 edits"):
        edits.apply_plan(plan(edit=[[0, EDIT_BIAS, 0, 0]]))
