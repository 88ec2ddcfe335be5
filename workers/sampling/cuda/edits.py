"""Requests' changes to their logits, in place, between the model and the sampler.

    rows        biases; then bans: stop tokens before min_tokens, ends of bad words
    penalties   allowed tokens; repetition, frequency and presence penalties

A row that asks for nothing is left at once, and of the others only what changes
is touched: penalties go through the list of the tokens that the sequence has, and
the vocabulary is read only where a row names its allowed tokens.  Arithmetic is
float32, rounded after every operation (nothing is fused), as the CPU computes it.
The order is that of ipc/params.py; allowing may come after biases, as nothing changes a logit of
-inf.  NaN and +inf stay: the sampler is to see that the model's logits are broken.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ....ipc.plan import (
    EDIT_BAD_WORD,
    EDIT_BAN_UNTIL,
    EDIT_BIAS,
    MAX_BAD_WORD_TOKENS,
    MAX_PLAN_EDITS,
    TAKE_ALLOWS,
    TAKE_COUNTS,
    TAKE_EDITS,
)
from ...kernels.cuda.overlap import come_up, overlapped, wait
from .edit_tables import IN_PROMPT, KIND_SHIFT, NEWEST, EditTables

_ROWS_BLOCK = 512
_PARTS = 8
_SEEN_BLOCK = 256
_TILE = 2048

_BIAS = tl.constexpr(EDIT_BIAS)
_BAN_UNTIL = tl.constexpr(EDIT_BAN_UNTIL)
_BAD_WORD = tl.constexpr(EDIT_BAD_WORD)
_WORD_TOKENS = tl.constexpr(MAX_BAD_WORD_TOKENS)
_CAPACITY = tl.constexpr(MAX_PLAN_EDITS)
_ALLOWS = tl.constexpr(TAKE_ALLOWS)
_COUNTS = tl.constexpr(TAKE_COUNTS)
_EDITS = tl.constexpr(TAKE_EDITS)
_KIND_SHIFT = tl.constexpr(KIND_SHIFT)
_TOKEN_MASK = tl.constexpr((1 << KIND_SHIFT) - 1)
_NEWEST = tl.constexpr(NEWEST)
_OFTEN = tl.constexpr(IN_PROMPT - 1)


@triton.jit
def _is_broken(z):
    return (z != z) | (z == float("inf"))


@triton.jit
def _ends_bad_word(
    edits, head, value, i, there, newest, position, prompt_len, WORD_TOKENS: tl.constexpr
):  # fmt: skip
    """Whether edits i are last tokens of words whose other tokens are the newest output.

    edits: the slot's rows.  newest: its newest output tokens.  position: of the token to come.
    """
    hit = there & ((head >> _KIND_SHIFT) == _BAD_WORD) & (value == 0)
    inside = hit
    for back in tl.static_range(1, WORD_TOKENS):
        before = i - back
        inside = inside & (before >= 0)
        earlier = tl.load(edits + before * 2, mask=inside, other=0)
        follow = tl.load(edits + before * 2 + 1, mask=inside, other=0)
        inside = inside & ((earlier >> _KIND_SHIFT) == _BAD_WORD) & (follow == back)
        at = position - back
        token = tl.load(newest + (at & (_NEWEST - 1)))
        same = (at >= prompt_len) & ((earlier & _TOKEN_MASK) == token)
        hit = hit & (same | (inside == 0))
    return hit


@triton.jit
def edit_rows(
    logits, slots, positions, flags, until, prompt_len, rows, row_count, newest,
    row_stride, first_id, width, BLOCK: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a row of logits: all biases, then all bans."""
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    if (tl.load(flags + slot) & _EDITS) != 0:
        count = tl.load(row_count + slot)
        position = tl.load(positions + row)
        edits = rows + slot * (_CAPACITY * 2)
        z_row = logits + row.to(tl.int64) * row_stride
        for first in range(0, count, BLOCK):
            i = first + tl.arange(0, BLOCK)
            there = i < count
            head = tl.load(edits + i * 2, mask=there, other=-1)
            value = tl.load(edits + i * 2 + 1, mask=there, other=0)
            token = (head & _TOKEN_MASK) - first_id
            bias = there & ((head >> _KIND_SHIFT) == _BIAS) & (token >= 0) & (token < width)
            z = tl.load(z_row + token, mask=bias, other=0.0).to(tl.float32)
            tl.store(z_row + token, z + value.to(tl.float32, bitcast=True), mask=bias)
        # A token may have both.
        tl.debug_barrier()
        is_early = position < tl.load(until + slot)
        ends = tl.load(prompt_len + slot)
        for first in range(0, count, BLOCK):
            i = first + tl.arange(0, BLOCK)
            there = i < count
            head = tl.load(edits + i * 2, mask=there, other=0)
            value = tl.load(edits + i * 2 + 1, mask=there, other=0)
            ban = there & ((head >> _KIND_SHIFT) == _BAN_UNTIL) & is_early
            ban = ban | _ends_bad_word(
                edits, head, value, i, there, newest + slot * _NEWEST, position, ends, _WORD_TOKENS
            )
            token = (head & _TOKEN_MASK) - first_id
            ban = ban & (token >= 0) & (token < width)
            z = tl.load(z_row + token, mask=ban, other=0.0).to(tl.float32)
            tl.store(z_row + token, tl.where(_is_broken(z), z, -float("inf")), mask=ban)


@triton.jit
def penalize(
    logits, slots, flags, repetitions, presences, frequencies, counts, seen, num_seen, allowed,
    row_stride, width, mask_words, room, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Program (r, p): every PARTS-th piece of row r.  No fused multiply-add: see the module.

    A seen token that is not allowed is written by two programs, with the same value.
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    flag = tl.load(flags + slot)
    part = tl.program_id(1)
    z_row = logits + row.to(tl.int64) * row_stride
    restricted = (flag & _ALLOWS) != 0
    if (flag & _COUNTS) != 0:
        repetition = tl.load(repetitions + slot)
        presence = tl.load(presences + slot)
        frequency = tl.load(frequencies + slot)
        if (repetition != 1.0) | (presence != 0.0) | (frequency != 0.0):
            listed = tl.minimum(tl.load(num_seen + slot), room)
            for first in range(part * BLOCK, listed, PARTS * BLOCK):
                i = first + tl.arange(0, BLOCK)
                there = i < listed
                token = tl.load(seen + slot.to(tl.int64) * room + i, mask=there, other=0)
                count = tl.load(counts + slot.to(tl.int64) * width + token, mask=there, other=0)
                z = tl.load(z_row + token, mask=there, other=0.0).to(tl.float32)
                banned = there & restricted
                word = tl.load(allowed + slot * mask_words + token // 32, mask=banned, other=0)
                banned = banned & (((word >> (token % 32)) & 1) == 0)
                divided = tl.div_rn(z, tl.full([BLOCK], 1.0, tl.float32) * repetition)
                y = tl.where(z > 0.0, divided, z * repetition)
                often = (count & _OFTEN).to(tl.float32)
                y = tl.where(often > 0.0, y - frequency * often - presence, y)
                y = tl.where(banned, -float("inf"), y)
                tl.store(z_row + token, tl.where(_is_broken(z), z, y), mask=there)
    if restricted:
        for first in range(part * TILE, width, PARTS * TILE):
            token = first + tl.arange(0, TILE)
            there = token < width
            word = tl.load(allowed + slot * mask_words + token // 32, mask=there, other=-1)
            banned = there & (((word >> (token % 32)) & 1) == 0)
            z = tl.load(z_row + token, mask=banned, other=0.0).to(tl.float32)
            tl.store(z_row + token, -float("inf"), mask=banned & (_is_broken(z) == 0))


def edit(
    logits: torch.Tensor, slots: torch.Tensor, draw_position: torch.Tensor, tables: EditTables
) -> None:
    """Edits logits [B, width], rows contiguous, float32 or bfloat16, in place.

    slots, draw_position: int32 [B], of whom each row is and the index in its
    sequence of the token to come.
    """
    rows, width = logits.shape
    if width != tables.width or logits.stride(1) != 1:
        raise ValueError(
            f"logits {tuple(logits.shape)} of strides {logits.stride()} do not fit tables of "
            f"{tables.width} contiguous tokens"
        )
    if not rows:
        return
    edit_rows[(rows,)](
        logits, slots, draw_position, tables.flags, tables.until, tables.prompt_len, tables.rows,
        tables.row_count, tables.newest, logits.stride(0), tables.first_id, width,
        BLOCK=_ROWS_BLOCK, enable_fp_fusion=False, **overlapped(logits.device),
    )  # fmt: skip
    penalize[(rows, _PARTS)](
        logits, slots, tables.flags, tables.repetition, tables.presence, tables.frequency,
        tables.counts, tables.seen, tables.num_seen, tables.allowed, logits.stride(0), width,
        tables.mask_words, tables.room, PARTS=_PARTS, BLOCK=_SEEN_BLOCK, TILE=_TILE,
        num_warps=4, enable_fp_fusion=False, **overlapped(logits.device),
    )  # fmt: skip
