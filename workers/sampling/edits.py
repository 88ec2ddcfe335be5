"""What requests change in their logits before sampling: allowed tokens, biases, bans, penalties.

The engine gives SlotEdits every plan, then the step's logits, then the tokens
that were sampled.  All of it works on this rank's shard of the vocabulary, so
what the ranks exchange afterwards is edited already.

Kept for a slot only while its request asks (TAKE_FLAGS); the tables are zero
pages of the system until then.  `seen` has a word for every token, `known`
lists the tokens whose word is not 0: penalties and the next request's reset
cost what the sequence has, not what the vocabulary has.

The order is that of ipc/params.py, the arithmetic float32.  A NaN or +inf of
the model's stays where it is: the sampler is to see that the row is broken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from ...ipc.plan import (
    EDIT_ALLOW,
    EDIT_BAD_WORD,
    EDIT_BAN_UNTIL,
    EDIT_BIAS,
    MAX_BAD_WORD_TOKENS,
    MAX_PLAN_EDITS,
    TAKE_ALLOWS,
    TAKE_COUNTS,
    TAKE_EDITS,
    TAKE_FLAGS,
    TAKE_FREQUENCY,
    TAKE_PRESENCE,
    TAKE_PROMPT_LEN,
    TAKE_REPETITION,
    TAKE_SLOT,
    TAKE_UNTIL,
    PlanView,
)
from ..machine_code import native
from .params import SampleRows

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

NEWEST = MAX_BAD_WORD_TOKENS
"""Output tokens of a slot that bad words can look at."""

_IN_PROMPT = np.int32(1)
_ONE_OUTPUT = np.int32(2)
_MINUS_INF = np.float32(-np.inf)
_INF = np.float32(np.inf)
_ONE = np.float32(1.0)
_ZERO = np.float32(0.0)


class EditTables(NamedTuple):
    """By slot; read and written by the kernels.

    flags, until, prompt_len: int32, as a take gives them (ipc/plan.py).
    repetition, presence, frequency: float32.
    edits: [slots, MAX_PLAN_EDITS, 3] int32: kind, token, value; values: the same
    memory as float32; edit_count: [slots] int32.
    seen: [slots, width] int32: twice the times a token is in the output, + 1 if in the prompt.
    known: [slots, width] int32, the shard's tokens (from 0) that are seen; known_count: int32.
    newest: [slots, NEWEST] int32, the output token of position p at p % NEWEST.
    """

    flags: Int32Array
    until: Int32Array
    prompt_len: Int32Array
    repetition: Float32Array
    presence: Float32Array
    frequency: Float32Array
    edits: Int32Array
    values: Float32Array
    edit_count: Int32Array
    seen: Int32Array
    known: Int32Array
    known_count: Int32Array
    newest: Int32Array


class SlotEdits:
    """Of all slots, over the `width` tokens from first_token on.

    A step: apply_plan, asked, apply where something was, count where TAKE_COUNTS was.
    """

    def __init__(self, slots: int, width: int, first_token: int = 0) -> None:
        def ints(*shape: int) -> Int32Array:
            return np.zeros((slots, *shape), np.int32)

        def floats(value: float) -> Float32Array:
            return np.full(slots, value, np.float32)

        edits = ints(MAX_PLAN_EDITS, 3)
        self._first = first_token
        self._tables = EditTables(
            ints(), ints(), ints(), floats(1.0), floats(0.0), floats(0.0), edits,
            edits.view(np.float32), ints(), ints(width), ints(width), ints(), ints(NEWEST),
        )  # fmt: skip
        self._kept = np.empty(MAX_PLAN_EDITS, np.float32)
        self._active = False

    def apply_plan(self, plan: PlanView) -> None:
        """Takes, edits, and the tokens that histories and chunks bring."""
        if len(plan.take):
            self._take(plan.take)
        if not self._active:
            return
        if len(plan.edit) and not _collect(self._tables, plan.edit.copy()):
            raise ValueError(f"the plan gives a slot more than {MAX_PLAN_EDITS} edits")
        if len(plan.history):
            self._see(plan.history, plan.history_token)
        if len(plan.chunk):
            self._see(plan.chunk, plan.chunk_token)

    def asked(self, rows: SampleRows) -> int:
        """The TAKE_FLAGS of all rows together; 0: nothing is to be done for them."""
        if not self._active:
            return 0
        return int(np.bitwise_or.reduce(self._tables.flags[rows.slots], initial=0))

    def apply(self, logits: Float32Array, rows: SampleRows) -> None:
        """Edits the rows' logits [R, width], C-contiguous, in place."""
        _edit_rows(logits, rows.slots, rows.positions, self._first, self._tables, self._kept)

    def count(self, rows: SampleRows, tokens: Int32Array) -> None:
        """The sampled tokens [R] of the rows; a negative one stands for none."""
        _count_sampled(self._tables, self._first, rows.slots, rows.positions, tokens)

    def _take(self, take: Int32Array) -> None:
        tables = self._tables
        flags = take[:, TAKE_FLAGS]
        tables.flags[take[:, TAKE_SLOT]] = flags
        self._active = bool(tables.flags.any())
        if not flags.any():
            return
        flagged = take[flags != 0]
        slots = flagged[:, TAKE_SLOT].copy()
        _forget(tables, slots)
        tables.until[slots] = flagged[:, TAKE_UNTIL]
        tables.prompt_len[slots] = flagged[:, TAKE_PROMPT_LEN]
        tables.repetition[slots] = flagged[:, TAKE_REPETITION].view(np.float32)
        tables.presence[slots] = flagged[:, TAKE_PRESENCE].view(np.float32)
        tables.frequency[slots] = flagged[:, TAKE_FREQUENCY].view(np.float32)

    def _see(self, ranges: Int32Array, tokens: Int32Array) -> None:
        """ranges: rows (slot, start, length, ...), whose tokens lie one after the other."""
        if (self._tables.flags[ranges[:, 0]] & TAKE_COUNTS).any():
            _see_tokens(self._tables, self._first, ranges[:, :3].copy(), tokens.copy())


@native()
def _forget(tables, slots):  # type: ignore[no-untyped-def]
    """Of the slots' last requests."""
    for slot in slots:
        for i in range(tables.known_count[slot]):
            tables.seen[slot, tables.known[slot, i]] = 0
        tables.known_count[slot] = 0
        tables.edit_count[slot] = 0


@native()
def _collect(tables, edit):  # type: ignore[no-untyped-def]
    """Rows (slot, kind, token, value) to their slots, in their order; False: one has no room."""
    for i in range(len(edit)):
        slot = edit[i, 0]
        count = tables.edit_count[slot]
        if count == MAX_PLAN_EDITS:
            return False
        for word in range(3):
            tables.edits[slot, count, word] = edit[i, 1 + word]
        tables.edit_count[slot] = count + 1
    return True


@njit(nogil=True)
def _see_token(tables, first, slot, position, token):  # type: ignore[no-untyped-def]
    is_output = position >= tables.prompt_len[slot]
    if is_output:
        tables.newest[slot, position % NEWEST] = token
    local = token - first
    if local < 0 or local >= tables.seen.shape[1]:
        return
    seen = tables.seen[slot, local]
    if seen == 0:
        tables.known[slot, tables.known_count[slot]] = local
        tables.known_count[slot] += 1
    tables.seen[slot, local] = seen + _ONE_OUTPUT if is_output else seen | _IN_PROMPT


@native()
def _see_tokens(tables, first, ranges, tokens):  # type: ignore[no-untyped-def]
    at = 0
    for i in range(len(ranges)):
        slot, start, length = ranges[i, 0], ranges[i, 1], ranges[i, 2]
        if tables.flags[slot] & TAKE_COUNTS:
            for j in range(length):
                _see_token(tables, first, slot, start + j, tokens[at + j])
        at += length


@native()
def _count_sampled(tables, first, slots, positions, tokens):  # type: ignore[no-untyped-def]
    for i in range(len(slots)):
        if tokens[i] >= 0 and tables.flags[slots[i]] & TAKE_COUNTS:
            _see_token(tables, first, slots[i], positions[i], tokens[i])


@native()
def _edit_rows(logits, slots, positions, first, tables, kept):  # type: ignore[no-untyped-def]
    """kept: [MAX_PLAN_EDITS] float32, scratch."""
    for i in range(len(slots)):
        slot = slots[i]
        flags = tables.flags[slot]
        row = logits[i]
        if flags & TAKE_EDITS:
            edits = tables.edits[slot, : tables.edit_count[slot]]
            if flags & TAKE_ALLOWS:
                _keep_allowed(row, first, edits, kept)
            _add_biases(row, first, edits, tables.values[slot])
            is_early = positions[i] < tables.until[slot]
            outputs = positions[i] - tables.prompt_len[slot]
            _ban(row, first, edits, is_early, positions[i], outputs, tables.newest[slot])
        if flags & TAKE_COUNTS:
            _penalize(
                row,
                tables.known[slot, : tables.known_count[slot]],
                tables.seen[slot],
                tables.repetition[slot],
                tables.presence[slot],
                tables.frequency[slot],
            )


@njit(nogil=True)
def _is_broken(z):  # type: ignore[no-untyped-def]
    return not z < _INF


@njit(nogil=True)
def _keep_allowed(row, first, edits, kept):  # type: ignore[no-untyped-def]
    broken = False
    for i in range(len(row)):
        broken |= _is_broken(row[i])
    if broken:
        return
    count = 0
    for i in range(len(edits)):
        local = edits[i, 1] - first
        if edits[i, 0] == EDIT_ALLOW and 0 <= local < len(row):
            kept[count] = row[local]
            count += 1
    for i in range(len(row)):
        row[i] = _MINUS_INF
    count = 0
    for i in range(len(edits)):
        local = edits[i, 1] - first
        if edits[i, 0] == EDIT_ALLOW and 0 <= local < len(row):
            row[local] = kept[count]
            count += 1


@njit(nogil=True)
def _add_biases(row, first, edits, values):  # type: ignore[no-untyped-def]
    for i in range(len(edits)):
        local = edits[i, 1] - first
        if edits[i, 0] == EDIT_BIAS and 0 <= local < len(row):
            row[local] += values[i, 2]


@njit(nogil=True)
def _ban(row, first, edits, is_early, position, outputs, newest):  # type: ignore[no-untyped-def]
    """position: of the token to come, after so many `outputs`."""
    for i in range(len(edits)):
        local = edits[i, 1] - first
        if local < 0 or local >= len(row):
            continue
        banned = edits[i, 0] == EDIT_BAN_UNTIL and is_early
        if edits[i, 0] == EDIT_BAD_WORD and edits[i, 2] == 0:
            banned = _ends_bad_word(edits, i, position, outputs, newest)
        if banned and not _is_broken(row[local]):
            row[local] = _MINUS_INF


@njit(nogil=True)
def _ends_bad_word(edits, last, position, outputs, newest):  # type: ignore[no-untyped-def]
    """Whether the tokens of the word before its last, edit number `last`, are the newest output."""
    for back in range(1, NEWEST):
        i = last - back
        if i < 0 or edits[i, 0] != EDIT_BAD_WORD or edits[i, 2] != back:
            break
        if back > outputs or newest[(position - back) % NEWEST] != edits[i, 1]:
            return False
    return True


@njit(nogil=True)
def _penalize(row, known, seen, repetition, presence, frequency):  # type: ignore[no-untyped-def]
    if repetition == _ONE and presence == _ZERO and frequency == _ZERO:
        return
    for i in range(len(known)):
        z = row[known[i]]
        z = z / repetition if z > _ZERO else z * repetition
        count = seen[known[i]] >> 1
        if count > 0:
            z -= frequency * np.float32(count)
            z -= presence
        row[known[i]] = z
