"""A plan while it is made: buffers of full size, filled from the front.

The buffers are made once; a Plan's arrays are views of them, valid until the
next plan is begun.  That is long enough: a plan is written into the ring at
once (ipc/plan.py has the layout and the meaning of the sections).

What the `_left` properties say is what the plan still has room for: budgets of
the policy.  All other sections are large enough for whatever these allow.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from albireo.ipc.plan import (
    APPEND_WORDS,
    CHUNK_WORDS,
    COPY_WORDS,
    EDIT_WORDS,
    GRAMMAR_WORDS,
    HISTORY_WORDS,
    MAX_PLAN_COPIES,
    MAX_PLAN_EDITS,
    MAX_PLAN_GRAMMAR_WORDS,
    MAX_PLAN_SCORES,
    SCORE_WORDS,
    TAKE_WORDS,
    Int32Array,
    PlanSections,
    max_appends,
)

from .blocks import Slots
from .limits import Limits


class Plan(NamedTuple):
    """One step; its arrays die with the next plan.

    sampled: int32 [n_row], the request of each sampling row; not sent, the
        workers know it.
    """

    step: int
    sections: PlanSections
    sampled: Int32Array


class _Section:
    """Rows of one section: int32 [rows, words], or [rows] where words is 1."""

    def __init__(self, rows: int, words: int) -> None:
        self._rows = np.zeros((rows, words) if words > 1 else rows, dtype=np.int32)
        self.count = 0

    @property
    def left(self) -> int:
        return len(self._rows) - self.count

    def extend(self, count: int) -> Int32Array:
        """The next `count` rows, to be written."""
        rows = self._rows[self.count : self.count + count]
        self.count += count
        return rows

    def view(self) -> Int32Array:
        return self._rows[: self.count]


class Draft:
    """The sections of the plan that is being made."""

    def __init__(self, limits: Limits) -> None:
        seqs, tokens = limits.max_num_seqs, limits.max_num_batched_tokens
        appends = max_appends(seqs, tokens, limits.block_size, limits.max_model_len)
        self._take = _Section(seqs, TAKE_WORDS)
        self._append = _Section(appends, APPEND_WORDS)
        self._chunk = _Section(seqs, CHUNK_WORDS)
        self._chunk_token = _Section(tokens, 1)
        self._edit = _Section(MAX_PLAN_EDITS, EDIT_WORDS)
        self._history = _Section(seqs, HISTORY_WORDS)
        self._history_token = _Section(limits.max_model_len, 1)
        self._grammar = _Section(seqs, GRAMMAR_WORDS)
        self._grammar_word = _Section(MAX_PLAN_GRAMMAR_WORDS, 1)
        self._score = _Section(MAX_PLAN_SCORES, SCORE_WORDS)
        self._copy = _Section(MAX_PLAN_COPIES, COPY_WORDS)
        self._all = (
            self._take, self._append, self._chunk, self._chunk_token, self._edit, self._history,
            self._history_token, self._grammar, self._grammar_word, self._score, self._copy,
        )  # fmt: skip

    def clear(self) -> None:
        """Begins a plan."""
        for section in self._all:
            section.count = 0

    @property
    def chunks(self) -> int:
        """Chunks so far."""
        return self._chunk.count

    @property
    def chunk_tokens(self) -> int:
        """Their tokens."""
        return self._chunk_token.count

    @property
    def scores_left(self) -> int:
        return self._score.left

    @property
    def copies_left(self) -> int:
        return self._copy.left

    def has_room(self, edits: int, history: int, appends: int, copies: int, grammar: int) -> bool:
        """Whether an admission with so many of each fits; grammar: bytes.

        To a plan without admissions each alone does: ipc.plan.max_appends has
        room for a longest sequence beside whatever chunks and decodes need.
        """
        return (
            edits <= self._edit.left
            and history <= self._history_token.left
            and appends <= self._append.left
            and copies <= self._copy.left
            and _words(grammar) <= self._grammar_word.left
        )

    def add_take(self, words: Int32Array, edits: Int32Array, slot: int) -> None:
        """A slot is given to a request: its [TAKE_WORDS] int32 words, and its edits."""
        self._take.extend(1)[0] = words
        if len(edits):
            rows = self._edit.extend(len(edits))
            rows[:] = edits
            rows[:, 0] = slot

    def add_grammar(self, slot: int, text: bytes) -> None:
        """What the output of a slot just taken has to match."""
        self._grammar.extend(1)[0] = (slot, len(text))
        words = self._grammar_word.extend(_words(len(text)))
        words.view(np.uint8)[: len(text)] = np.frombuffer(text, np.uint8)

    def add_append(self, slots: Slots | int, index: Int32Array | Slots, blocks: Int32Array) -> None:
        """Entries of block tables, one for each block: [n] each, or the same slot for all."""
        rows = self._append.extend(len(blocks))
        rows[:, 0] = slots
        rows[:, 1] = index
        rows[:, 2] = blocks

    def add_chunk(self, slot: int, start: int, tokens: Int32Array, samples: bool) -> None:
        """A piece of a prefill: its tokens begin at position `start`."""
        self._chunk.extend(1)[0] = (slot, start, len(tokens), samples)
        self._chunk_token.extend(len(tokens))[:] = tokens

    def add_scores(self, offset: int, following: Int32Array) -> None:
        """Scores rows of the last chunk, from its `offset`-th on; following: the next tokens."""
        length = int(self._chunk.view()[-1, 2])
        first = self._chunk_token.count - length + offset
        rows = self._score.extend(len(following))
        rows[:, 0] = np.arange(first, first + len(following))
        rows[:, 1] = following

    def add_history(self, slot: int, tokens: Int32Array) -> None:
        """The first tokens of a slot just taken, which no chunk brings."""
        self._history.extend(1)[0] = (slot, 0, len(tokens))
        self._history_token.extend(len(tokens))[:] = tokens

    def add_copies(self, kind: int, source: Int32Array, target: Int32Array) -> None:
        """Blocks to be moved: int32 [n] each.  No target of a plan is a source, or twice."""
        rows = self._copy.extend(len(source))
        rows[:, 0] = kind
        rows[:, 1] = source
        rows[:, 2] = target

    def sampling_chunks(self) -> Slots:
        """Slots of the chunks that sample, in their order."""
        chunks = self._chunk.view()
        sampling: Slots = chunks[chunks[:, 3] == 1, 0].astype(np.intp)
        return sampling

    def plan(self, step: int, decode: Slots, sampled: Int32Array) -> Plan:
        """The finished plan."""
        return Plan(
            step,
            PlanSections(
                take=self._take.view(),
                append=self._append.view(),
                chunk=self._chunk.view(),
                chunk_token=self._chunk_token.view(),
                decode=decode.astype(np.int32),
                edit=self._edit.view(),
                history=self._history.view(),
                history_token=self._history_token.view(),
                grammar=self._grammar.view(),
                grammar_word=self._grammar_word.view(),
                score=self._score.view(),
                copy=self._copy.view(),
            ),
            sampled,
        )


def _words(size: int) -> int:
    """Of so many bytes."""
    return -(-size // 4)
