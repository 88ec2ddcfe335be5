"""The kernels that keep EditTables: what takes reset, edits that arrive, tokens that are known.

Launched behind `apply`, one by one, in the steps whose plan has any of it; never
in a decode step's graph.  (Sampled tokens are counted by `advance`.)

    reset    bits, and the counts they stand for, of slots taken by requests with flags
    collect  edits into the slots' rows, allowed tokens into their masks
    see      tokens of histories, then of chunks: bits, counts, the newest output
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl

from ....ipc.plan import (
    CHUNK_WORDS,
    EDIT_ALLOW,
    EDIT_WORDS,
    HISTORY_WORDS,
    MAX_PLAN_EDITS,
    PLAN_HEADER,
    SECTIONS,
    TAKE_COUNTS,
    TAKE_EDITS,
    TAKE_FLAGS,
    TAKE_SLOT,
    TAKE_WORDS,
    PlanView,
)
from ...sampling.cuda.edit_tables import KIND_SHIFT, NEWEST
from .slot_tables import SlotTables

_PARTS = 8
_BLOCK = 256
_MASK_BLOCK = 128
_EDITS_BLOCK = 1024

_HEADER = tl.constexpr(PLAN_HEADER)
_TAKE = tl.constexpr(TAKE_WORDS)
_SLOT = tl.constexpr(TAKE_SLOT)
_FLAGS = tl.constexpr(TAKE_FLAGS)
_COUNTS = tl.constexpr(TAKE_COUNTS)
_EDITS = tl.constexpr(TAKE_EDITS)
_ALLOW = tl.constexpr(EDIT_ALLOW)
_EDIT = tl.constexpr(EDIT_WORDS)
_CAPACITY = tl.constexpr(MAX_PLAN_EDITS)
_KIND_SHIFT = tl.constexpr(KIND_SHIFT)
_NEWEST = tl.constexpr(NEWEST)


@triton.jit
def _reset(
    words, in_prompt, in_output, allowed, counts, width, mask_words,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (k, p) resets every PARTS-th piece of the slot of take k."""
    take = words + _HEADER + tl.program_id(0) * _TAKE
    if tl.load(take + _FLAGS) != 0:
        slot = tl.load(take + _SLOT)
        row = slot.to(tl.int64) * width
        nothing = tl.zeros([BLOCK], tl.int32)
        for first in range(tl.program_id(1) * BLOCK, mask_words, PARTS * BLOCK):
            word = first + tl.arange(0, BLOCK)
            there = word < mask_words
            at = slot * mask_words + word
            counted = tl.load(in_output + at, mask=there, other=0)
            if tl.max((counted != 0).to(tl.int32), 0) != 0:
                for bit in range(32):
                    token = word * 32 + bit
                    tl.store(counts + row + token, nothing, mask=((counted >> bit) & 1) != 0)
            tl.store(in_output + at, nothing, mask=there)
            tl.store(in_prompt + at, nothing, mask=there)
            tl.store(allowed + at, nothing, mask=there)


@triton.jit(do_not_specialize=["edits_at", "n_edit"])
def _collect(
    words, edits_at, n_edit, rows, row_count, allowed, first_id, width, mask_words,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program k collects the edits of take k's slot, in their order."""
    take = words + _HEADER + tl.program_id(0) * _TAKE
    if (tl.load(take + _FLAGS) & _EDITS) != 0:
        slot = tl.load(take + _SLOT)
        found = tl.full([], 0, tl.int32)
        for first in range(0, n_edit, BLOCK):
            i = first + tl.arange(0, BLOCK)
            edit = words + edits_at + i * _EDIT
            mine = tl.load(edit, mask=i < n_edit, other=-1) == slot
            kind = tl.load(edit + 1, mask=mine, other=0)
            token = tl.load(edit + 2, mask=mine, other=0)
            value = tl.load(edit + 3, mask=mine, other=0)
            kept = mine & (kind != _ALLOW)
            place = found + tl.cumsum(kept.to(tl.int32), 0) - 1
            to = rows + (slot * _CAPACITY + place) * 2
            tl.store(to, (kind << _KIND_SHIFT) | token, mask=kept & (place < _CAPACITY))
            tl.store(to + 1, value, mask=kept & (place < _CAPACITY))
            found += tl.sum(kept.to(tl.int32), 0)
            local = token - first_id
            is_allowed = mine & (kind == _ALLOW) & (local >= 0) & (local < width)
            local = tl.where(is_allowed, local, 0)
            bit = tl.full([BLOCK], 1, tl.int32) << (local % 32)
            mask = allowed + slot * mask_words + local // 32
            tl.atomic_or(mask, bit, mask=is_allowed, sem="relaxed")
        tl.store(row_count + slot, tl.minimum(found, _CAPACITY))


@triton.jit(do_not_specialize=["ranges_at", "tokens_at"])
def _see(
    words, ranges_at, tokens_at, flags, prompt_len, counts, in_prompt, in_output, newest,
    first_id, width, mask_words,
    WORDS: tl.constexpr, RANGES: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (r, p) sees every PARTS-th piece of range r, a row (slot, start, length, ...).

    The ranges' tokens lie one after the other; RANGES: a bound of their number.
    """
    which = tl.program_id(0)
    ranges = words + ranges_at
    mine = ranges + which * WORDS
    slot = tl.load(mine)
    if (tl.load(flags + slot) & _COUNTS) != 0:
        others = tl.arange(0, RANGES)
        before = tl.sum(tl.load(ranges + others * WORDS + 2, mask=others < which, other=0), 0)
        start = tl.load(mine + 1)
        length = tl.load(mine + 2)
        ends = tl.load(prompt_len + slot)
        row = slot.to(tl.int64) * width
        for first in range(tl.program_id(1) * BLOCK, length, PARTS * BLOCK):
            i = first + tl.arange(0, BLOCK)
            there = i < length
            token = tl.load(words + tokens_at + before + i, mask=there, other=0)
            position = start + i
            is_output = there & (position >= ends)
            # Older ones would share the places of these.
            is_newest = is_output & (i >= length - _NEWEST)
            tl.store(newest + slot * _NEWEST + position % _NEWEST, token, mask=is_newest)
            local = token - first_id
            here = there & (local >= 0) & (local < width)
            local = tl.where(here, local, 0)
            bit = tl.full([BLOCK], 1, tl.int32) << (local % 32)
            word = slot * mask_words + local // 32
            tl.atomic_or(in_prompt + word, bit, mask=here & (position < ends), sem="relaxed")
            tl.atomic_or(in_output + word, bit, mask=here & is_output, sem="relaxed")
            tl.atomic_add(counts + row + local, 1, mask=here & is_output, sem="relaxed")


def keep_edits(tables: SlotTables, plan: PlanView, flagged_takes: bool, counted: bool) -> None:
    """The plan in tables.words, after `apply`, into tables.edits.

    flagged_takes: a take has flags.  counted: a chunk or a history is of a slot with COUNTS.
    """
    edits, words = tables.edits, tables.words
    sizes = (getattr(plan, name).size for name, _ in SECTIONS)
    offsets = itertools.accumulate(sizes, initial=PLAN_HEADER)
    at = {name: offset for (name, _), offset in zip(SECTIONS, offsets, strict=False)}
    if flagged_takes:
        takes = len(plan.take)
        _reset[(takes, _PARTS)](
            words, edits.in_prompt, edits.in_output, edits.allowed, edits.counts,
            edits.width, edits.mask_words, PARTS=_PARTS, BLOCK=_MASK_BLOCK,
        )  # fmt: skip
        _collect[(takes,)](
            words, at["edit"], len(plan.edit), edits.rows, edits.row_count, edits.allowed,
            edits.first_id, edits.width, edits.mask_words, BLOCK=_EDITS_BLOCK,
        )  # fmt: skip
    if counted:
        _launch_see(tables, len(plan.history), at["history"], at["history_token"], HISTORY_WORDS)
        _launch_see(tables, len(plan.chunk), at["chunk"], at["chunk_token"], CHUNK_WORDS)


def _launch_see(
    tables: SlotTables, ranges: int, ranges_at: int, tokens_at: int, words: int
) -> None:
    edits = tables.edits
    if ranges:
        _see[(ranges, _PARTS)](
            tables.words, ranges_at, tokens_at, edits.flags, edits.prompt_len, edits.counts,
            edits.in_prompt, edits.in_output, edits.newest, edits.first_id, edits.width,
            edits.mask_words, WORDS=words, RANGES=triton.next_power_of_2(tables.max_num_seqs),
            PARTS=_PARTS, BLOCK=_BLOCK,
        )  # fmt: skip
