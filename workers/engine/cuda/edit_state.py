"""The kernels that keep EditTables: what takes reset, edits that arrive, tokens that are known.

Launched behind `apply`, one by one, in the steps whose plan has any of it; never
in a decode step's graph.  (Sampled tokens are counted by `advance`.)

    reset    the counts of seen tokens, and masks, of slots taken by requests with flags
    collect  edits into the slots' rows, allowed tokens into their masks
    see      tokens of histories, then of chunks: counts, the list of seen tokens, the newest output
"""

from __future__ import annotations

import itertools

import triton
import triton.language as tl

from ....ipc.plan import (
    CHUNK_WORDS,
    EDIT_ALLOW,
    HISTORY_WORDS,
    MAX_PLAN_EDITS,
    PLAN_HEADER,
    SECTIONS,
    TAKE_COUNTS,
    TAKE_EDITS,
    TAKE_FLAGS,
    TAKE_SLOT,
    PlanView,
)
from ...sampling.cuda.edit_tables import IN_PROMPT, KIND_SHIFT, NEWEST
from .plan_words import EDIT, HEADER, TAKE
from .slot_tables import SlotTables

_PARTS = 8
_BLOCK = 256
_EDITS_BLOCK = 1024

_SLOT = tl.constexpr(TAKE_SLOT)
_FLAGS = tl.constexpr(TAKE_FLAGS)
_COUNTS = tl.constexpr(TAKE_COUNTS)
_EDITS = tl.constexpr(TAKE_EDITS)
_ALLOW = tl.constexpr(EDIT_ALLOW)
_CAPACITY = tl.constexpr(MAX_PLAN_EDITS)
_KIND_SHIFT = tl.constexpr(KIND_SHIFT)
_NEWEST = tl.constexpr(NEWEST)
_IN_PROMPT = tl.constexpr(IN_PROMPT)


@triton.jit
def _reset(
    words, allowed, counts, seen, num_seen, width, mask_words, room,
    PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (k, p) resets every PARTS-th piece of the slot of take k, but for num_seen."""
    take = words + HEADER + tl.program_id(0) * TAKE
    if tl.load(take + _FLAGS) != 0:
        slot = tl.load(take + _SLOT)
        start = tl.program_id(1) * BLOCK
        nothing = tl.zeros([BLOCK], tl.int32)
        listed = tl.minimum(tl.load(num_seen + slot), room)
        for first in range(start, listed, PARTS * BLOCK):
            i = first + tl.arange(0, BLOCK)
            there = i < listed
            token = tl.load(seen + slot.to(tl.int64) * room + i, mask=there, other=0)
            tl.store(counts + slot.to(tl.int64) * width + token, nothing, mask=there)
        for first in range(start, mask_words, PARTS * BLOCK):
            word = first + tl.arange(0, BLOCK)
            tl.store(allowed + slot * mask_words + word, nothing, mask=word < mask_words)


@triton.jit(do_not_specialize=["edits_at", "n_edit"])
def _collect(
    words, edits_at, n_edit, rows, row_count, allowed, num_seen, first_id, width, mask_words,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Program k collects the edits of take k's slot, in their order, and ends its reset."""
    take = words + HEADER + tl.program_id(0) * TAKE
    take_flags = tl.load(take + _FLAGS)
    slot = tl.load(take + _SLOT)
    if take_flags != 0:
        tl.store(num_seen + slot, 0)
    if (take_flags & _EDITS) != 0:
        found = tl.full([], 0, tl.int32)
        for first in range(0, n_edit, BLOCK):
            i = first + tl.arange(0, BLOCK)
            edit = words + edits_at + i * EDIT
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
    words, ranges_at, tokens_at, flags, prompt_len, counts, seen, num_seen, newest,
    first_id, width, room,
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
            count = counts + row + local
            in_prompt = tl.full([BLOCK], _IN_PROMPT, tl.int32)
            is_prompt = here & (position < ends)
            is_new = is_prompt & (
                tl.atomic_or(count, in_prompt, mask=is_prompt, sem="relaxed") == 0
            )
            one = tl.full([BLOCK], 1, tl.int32)
            is_output = here & is_output
            is_new |= is_output & (tl.atomic_add(count, one, mask=is_output, sem="relaxed") == 0)
            found = tl.sum(is_new.to(tl.int32), 0)
            if found > 0:
                listed = tl.atomic_add(num_seen + slot, found, sem="relaxed")
                place = listed + tl.cumsum(is_new.to(tl.int32), 0) - 1
                listing = seen + slot.to(tl.int64) * room + place
                tl.store(listing, local, mask=is_new & (place < room))


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
            words, edits.allowed, edits.counts, edits.seen, edits.num_seen, edits.width,
            edits.mask_words, edits.room, PARTS=_PARTS, BLOCK=_BLOCK,
        )  # fmt: skip
        _collect[(takes,)](
            words, at["edit"], len(plan.edit), edits.rows, edits.row_count, edits.allowed,
            edits.num_seen, edits.first_id, edits.width, edits.mask_words, BLOCK=_EDITS_BLOCK,
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
            edits.seen, edits.num_seen, edits.newest, edits.first_id, edits.width, edits.room,
            WORDS=words, RANGES=triton.next_power_of_2(tables.max_num_seqs),
            PARTS=_PARTS, BLOCK=_BLOCK,
        )  # fmt: skip
