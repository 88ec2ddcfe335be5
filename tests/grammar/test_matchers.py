"""The grammars of slots: which masks a step gets, and how plans and tokens move them."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import pytest
from llguidance import LLParserLimits

from albireo.ipc.plan import (
    ROW_GRAMMAR_END,
    ROW_GRAMMAR_FAILED,
    ROW_NOT_FINITE,
    ROW_NOTHING_ALLOWED,
    TAKE_FLAGS,
    TAKE_GRAMMAR,
    TAKE_PROMPT_LEN,
    TAKE_SLOT,
    TAKE_WORDS,
    PlanView,
)
from albireo.workers.grammar.matchers import GrammarRows, SlotGrammars

from ..plans import plan_of
from .model import encode, end_id, tokens_of, vocabulary

SLOTS = 6
PROMPT = [5, 6, 7]


def grammars(threads: int = 2) -> SlotGrammars:
    return SlotGrammars(vocabulary(), SLOTS, threads, timeout_s=20.0)


def plan(*takes: tuple[int, str], prompt_len: int = len(PROMPT), **rows: Any) -> PlanView:
    """takes: (slot, grammar or ""); rows: further sections."""
    take, grammar, words = [], [], []
    for slot, text in takes:
        row = [0] * TAKE_WORDS
        row[TAKE_SLOT], row[TAKE_PROMPT_LEN] = slot, prompt_len
        row[TAKE_FLAGS] = TAKE_GRAMMAR if text else 0
        take.append(row)
        if text:
            raw = text.encode()
            grammar.append([slot, len(raw)])
            words += np.frombuffer(raw + b"?" * (-len(raw) % 4), np.int32).tolist()
    return plan_of(SLOTS, 256, 16, 512, take=take, grammar=grammar, grammar_word=words, **rows)


def step(made: SlotGrammars, slots: list[int]) -> GrammarRows:
    asked = np.array(slots, np.int32)
    masks = np.zeros((SLOTS, vocabulary().mask_words), np.int32)
    rows = made.begin(made.rows_of(asked), asked, masks)
    made.finish(rows)
    return rows


def reference(text: str, words: str) -> set[int]:
    matcher = vocabulary().matcher(text)
    assert matcher.consume_tokens(encode(words))
    return tokens_of(matcher.compute_bitmask())


def test_rows_without_a_grammar_are_none_of_its_business() -> None:
    made = grammars()
    made.apply_plan(plan((1, ""), (2, "")))
    assert not len(made.rows_of(np.array([1, 2], np.int32)))
    made.apply_plan(plan((3, "start: /a+/")))
    asked = np.array([1, 3, 2], np.int32)
    assert made.rows_of(asked).tolist() == [1]
    before = threading.active_count()
    grammars().apply_plan(plan((1, "")))
    assert threading.active_count() == before


def test_masks_follow_the_sampled_tokens() -> None:
    made = grammars()
    texts = {0: "start: /[ab]+c/", 2: 'start: "z" /[0-9]/', 4: "start: /x*/"}
    made.apply_plan(plan(*texts.items()))
    words = {0: "", 2: "", 4: ""}
    for more in ({0: "a", 2: "z", 4: "x"}, {0: "b", 2: "7", 4: "x"}):
        rows = step(made, [4, 1, 0, 2])
        assert rows.rows.tolist() == [0, 2, 3]
        tokens = np.full(4, 3, np.int32)
        for row, slot in ((0, 4), (2, 0), (3, 2)):
            index = rows.rows.tolist().index(row)
            assert tokens_of(rows.masks[index]) == reference(texts[slot], words[slot])
            words[slot] += more[slot]
            tokens[row] = encode(more[slot])[0]
        kept = tokens.copy()
        rows.accept(tokens)
        assert np.array_equal(tokens, kept)


def test_what_came_before_is_replayed_from_histories_and_chunks() -> None:
    """As after a preemption or a failover: the output is part of what is computed again."""
    text, output = "start: /[a-c]+d/", encode("abcab")
    tokens = PROMPT + output
    for cached in range(len(tokens)):
        made = grammars()
        made.apply_plan(
            plan(
                (1, text), (0, ""),
                history=[[0, 0, 2], [1, 0, cached]], history_token=[8, 9, *tokens[:cached]],
                chunk=[[0, 2, 1, 1], [1, cached, len(tokens) - cached, 1]],
                chunk_token=[8, *tokens[cached:]],
            )
        )  # fmt: skip
        rows = step(made, [0, 1])
        assert tokens_of(rows.masks[0]) == reference(text, "abcab")


def test_a_slot_that_is_taken_again_has_nothing_of_its_last_request() -> None:
    made = grammars()
    made.apply_plan(plan((1, "start: /[ab]+/")))
    rows = step(made, [1])
    made.apply_plan(plan((1, "start: /x+/")))
    rows.accept(np.array(encode("a"), np.int32))
    assert tokens_of(step(made, [1]).masks[0]) == reference("start: /x+/", "")
    made.apply_plan(plan((1, "")))
    assert not len(made.rows_of(np.array([1], np.int32)))


def test_a_grammar_that_can_only_stop_ends_its_row() -> None:
    made = grammars()
    made.apply_plan(plan((1, 'start: "a"')))
    rows = step(made, [1])
    rows.accept(np.array(encode("a"), np.int32))
    for _ in range(2):  # also in the surplus steps that were planned meanwhile
        rows = step(made, [1])
        tokens = np.array([17], np.int32)
        rows.accept(tokens)
        assert tokens.tolist() == [-1 - ROW_GRAMMAR_END]


def test_an_end_token_ends_it_too() -> None:
    made = grammars()
    made.apply_plan(plan((1, "start: /a*/")))
    rows = step(made, [1])
    assert end_id() in tokens_of(rows.masks[0])
    rows.accept(np.array([end_id()], np.int32))
    assert step(made, [1]).outcome.tolist() == [ROW_GRAMMAR_END]


def test_a_step_gives_its_tokens_once() -> None:
    """Who launches the next step and who waits for this one's end both do it."""
    made = grammars()
    made.apply_plan(plan((1, "start: /ab/")))
    rows, tokens = step(made, [1]), np.array(encode("a")[:1], np.int32)
    rows.accept(tokens)
    rows.accept(tokens)
    assert tokens_of(step(made, [1]).masks[0]) == reference("start: /ab/", "a")


def test_a_row_that_could_not_be_sampled_says_so() -> None:
    made = grammars()
    made.apply_plan(plan((1, "start: /a*/")))
    for why in (ROW_NOT_FINITE, ROW_NOTHING_ALLOWED):  # as the sampler has found it
        tokens = np.array([-1 - why, -1 - why], np.int32)
        step(made, [0, 1]).accept(tokens)
        assert tokens.tolist() == [-1 - why] * 2


def test_a_matcher_that_gives_up_fails_its_row_alone() -> None:
    made = grammars()
    made.apply_plan(plan((1, "start: /a*/"), (2, "start: /b*/")))
    step(made, [1, 2]).accept(np.array([encode("z")[0], encode("b")[0]], np.int32))
    rows = step(made, [1, 2])
    assert rows.outcome.tolist() == [ROW_GRAMMAR_FAILED, 0]
    assert tokens_of(rows.masks[1]) == reference("start: /b*/", "b")


def test_what_one_answer_spends_is_spent_by_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same grammar, too: neither in the slot beside it nor of a later request."""
    limits = LLParserLimits(max_lexer_states=600, verbose_errors=False)
    monkeypatch.setattr("albireo.workers.grammar.vocabulary.LIMITS", limits)
    made, text = grammars(), "start: /[ab]{1,5000}c/"
    made.apply_plan(plan((0, text), (1, text)))
    letter = np.array([encode("a")[0], encode("b")[0]], np.int32)
    step(made, [0, 1]).accept(letter.copy())
    for _ in range(1000):
        rows = step(made, [0])
        if rows.outcome[0]:
            break
        rows.accept(letter[:1].copy())
    assert rows.outcome.tolist() == [ROW_GRAMMAR_FAILED], "the limit was never reached"
    rows = step(made, [1])
    assert rows.outcome.tolist() == [0] and tokens_of(rows.masks[0]) == reference(text, "b")
    made.apply_plan(plan((2, text)))
    assert step(made, [2]).outcome.tolist() == [0]


def test_matchers_are_made_beside_the_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the plan on that takes the slot; nobody waits for them but their own rows, and those
    that are wanted no longer are not made."""
    made, go_on, compiled = grammars(threads=1), threading.Event(), []
    fresh = type(vocabulary()).matcher

    def make(self: Any, text: str) -> Any:
        compiled.append(text)
        assert text != "start: /b+/" or go_on.wait(20)
        return fresh(self, text)

    monkeypatch.setattr(type(vocabulary()), "matcher", make)
    made.apply_plan(plan((0, "start: /a+/")))
    step(made, [0])
    made.apply_plan(plan((1, "start: /b+/")))
    for _ in range(3):
        assert step(made, [0]).outcome.tolist() == [0]
        made.apply_plan(plan((2, "start: /c+/")))
    made.apply_plan(plan((2, "start: /d+/")))
    go_on.set()
    assert step(made, [0, 1, 2]).outcome.tolist() == [0] * 3
    assert compiled == [f"start: /{letter}+/" for letter in "abd"]


def test_a_late_mask_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    made = SlotGrammars(vocabulary(), SLOTS, 1, timeout_s=0.05)
    go_on = threading.Event()
    monkeypatch.setattr(type(vocabulary()), "matcher", lambda *_: go_on.wait(20))
    made.apply_plan(plan((1, "start: /a*/")))
    with pytest.raises(TimeoutError, match=r"masks of 1 rows are not there after 0\.05 s"):
        step(made, [1])
    go_on.set()
