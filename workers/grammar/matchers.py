"""The grammars of a worker's slots, and the masks of a step's rows, made beside its forward pass.

Every rank keeps a matcher for each slot with a grammar, and moves it by the same tokens, so all
ranks have the same masks without a word to each other.  A step:

    apply_plan   slots taken, whose matchers threads begin to make; tokens that histories and
                 chunks bring
    begin        threads compute the masks of the rows that have a grammar
    ...          the forward pass
    finish       waits for them
    accept       the sampled tokens, by which the next begin() moves the matchers

What a preempted or resumed request has generated comes with its take again (ipc/plan.py), so its
matcher is simply made anew.  A worker without grammars does nothing of this, and has no thread.

Nor do requests of one schema share anything: llguidance's deep_copy() leaves the lexer to all its
copies, with what it has spent of its limits, so that one answer would end the others, and ranks
would not agree on when.
"""

from __future__ import annotations

import threading
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

import numpy as np

from ...ipc.plan import (
    ROW_GRAMMAR_END,
    ROW_GRAMMAR_FAILED,
    TAKE_FLAGS,
    TAKE_GRAMMAR,
    TAKE_PROMPT_LEN,
    TAKE_SLOT,
    Int32Array,
    PlanView,
)

if TYPE_CHECKING:
    from llguidance import LLMatcher

    from .vocabulary import Vocabulary

_MASKED = 0


class SlotGrammar:
    """Of one request in its slot.

    matcher: at its beginning, once it is made.  pending: output tokens that it has not seen.
    """

    __slots__ = ("matcher", "pending", "prompt_len")

    def __init__(self, matcher: Future[LLMatcher], prompt_len: int) -> None:
        self.matcher = matcher
        self.prompt_len = prompt_len
        self.pending: list[int] = []


class GrammarRows:
    """The sampling rows of one step that have a grammar.

    rows: their places among the sampling rows, [g] int32.  states: of each.
    masks: [g, mask_words] int32; valid where outcome is 0.
    outcome: [g] int32: 0, or the ROW_... that the row has in place of a token.
    accepted: the grammars have the step's tokens.
    """

    def __init__(self, rows: Int32Array, states: list[SlotGrammar], masks: Int32Array) -> None:
        self.rows = rows
        self.states = states
        self.masks = masks
        self.outcome = np.full(len(rows), _MASKED, np.int32)
        self.begun: list[Future[None]] = []
        self.accepted = False
        self._lock = threading.Lock()

    def accept(self, tokens: Int32Array) -> None:
        """tokens [R], sampled: grammars take theirs; rows that have to end get -1 - ROW_... .

        Any thread may call it; the first call counts.
        """
        with self._lock:
            if not self.accepted:
                self._accept(tokens)
                self.accepted = True

    def _accept(self, tokens: Int32Array) -> None:
        mine = tokens[self.rows]
        tokens[self.rows] = np.where(self.outcome == _MASKED, mine, -1 - self.outcome)
        for state, token, outcome in zip(
            self.states, mine.tolist(), self.outcome.tolist(), strict=True
        ):
            if outcome == _MASKED and token >= 0:
                state.pending.append(token)


class SlotGrammars:
    """Of so many slots; at most max_rows rows sample in a step.

    vocabulary: None where grammars are not served.  threads: that make matchers and masks.
    """

    def __init__(
        self, vocabulary: Vocabulary | None, slots: int, threads: int, timeout_s: float
    ) -> None:
        self._vocabulary = vocabulary
        self._threads = threads
        self._timeout_s = timeout_s
        self._has = np.zeros(slots, np.bool_)
        self._states: dict[int, SlotGrammar] = {}
        # Each starts its threads with what it first gets to do.
        self._making = ThreadPoolExecutor(threads, thread_name_prefix="grammar")
        self._masking = ThreadPoolExecutor(threads, thread_name_prefix="mask")

    def apply_plan(self, plan: PlanView) -> None:
        """The plan's takes, and the output tokens that it brings."""
        if len(plan.take):
            self._take(plan)
        if self._states:
            if len(plan.history):
                self._see(plan.history, plan.history_token)
            if len(plan.chunk):
                self._see(plan.chunk, plan.chunk_token)

    def rows_of(self, slots: Int32Array) -> Int32Array:
        """Which of a step's sampling rows, of these slots, have a grammar: indices."""
        if not self._states:
            return slots[:0]
        return np.flatnonzero(self._has[slots]).astype(np.int32)

    def begin(self, rows: Int32Array, slots: Int32Array, masks: Int32Array) -> GrammarRows:
        """Threads begin with the masks of `rows`, from rows_of(slots), in masks[:len(rows)].

        masks: C-contiguous; not to be used otherwise until finish().
        """
        step = GrammarRows(
            rows, [self._states[slot] for slot in slots[rows].tolist()], masks[: len(rows)]
        )
        for first in range(min(self._threads, len(rows))):
            step.begun.append(self._masking.submit(self._compute, step, first))
        return step

    def finish(self, step: GrammarRows) -> None:
        """Waits for the masks.  Raises TimeoutError, and what went wrong in a thread."""
        _, late = wait(step.begun, self._timeout_s)
        if late:
            raise TimeoutError(
                f"the grammar masks of {len(step.rows)} rows are not there after "
                f"{self._timeout_s:g} s"
            )
        for future in step.begun:
            future.result()

    def _take(self, plan: PlanView) -> None:
        for slot in plan.take[:, TAKE_SLOT].tolist():
            before = self._states.pop(slot, None)
            if before is not None:
                before.matcher.cancel()  # it may have ended before it was wanted
        self._has[plan.take[:, TAKE_SLOT]] = (plan.take[:, TAKE_FLAGS] & TAKE_GRAMMAR) != 0
        if not len(plan.grammar):
            return
        assert self._vocabulary is not None
        prompt_len = dict(plan.take[:, [TAKE_SLOT, TAKE_PROMPT_LEN]].tolist())
        at = 0
        for slot, size in plan.grammar.tolist():
            words = -(-size // 4)
            text = plan.grammar_word[at : at + words].tobytes()[:size].decode()
            matcher = self._making.submit(self._vocabulary.matcher, text)
            self._states[slot] = SlotGrammar(matcher, prompt_len[slot])
            at += words

    def _see(self, ranges: Int32Array, tokens: Int32Array) -> None:
        """ranges: rows (slot, start, length, ...), whose tokens lie one after the other."""
        at = 0
        for slot, start, length in ranges[:, :3].tolist():
            state = self._states.get(slot)
            if state is not None:
                first = max(0, state.prompt_len - start)
                state.pending += tokens[at + first : at + length].tolist()
            at += length

    def _compute(self, step: GrammarRows, first: int) -> None:
        """In a thread: every so manieth row; the work itself leaves the interpreter alone."""
        for row in range(first, len(step.rows), self._threads):
            step.outcome[row] = self._mask(step.states[row], step.masks[row])

    def _mask(self, state: SlotGrammar, mask: Int32Array) -> int:
        matcher = state.matcher.result()
        if state.pending:
            if not matcher.is_stopped():
                matcher.consume_tokens(state.pending)
            state.pending = []
        if not matcher.is_error():
            if matcher.is_stopped():
                return ROW_GRAMMAR_END
            matcher.unsafe_compute_mask_ptr(mask.ctypes.data, mask.nbytes)
        return ROW_GRAMMAR_FAILED if matcher.is_error() else _MASKED
