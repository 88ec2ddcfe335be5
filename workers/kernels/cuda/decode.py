"""Attention of decodes: one query row a sequence, the keys of a row shared out among programs.

    grid  (kv_heads, splits, sequences); a program has all query heads of one KV head

A sequence without keys, which pads a captured size, has no row: its programs return at once.

The splits of a row take equal shares of its actual length, so that a short
context wastes nothing; programs beyond it return at once.  A row that one
program does alone is written by it.  Otherwise each leaves its sums, and the
one that finishes last adds them up, always in the order of the keys: the
result does not depend on who was last.

`counters` counts the finished programs of a row and KV head; it is all zeros
between launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .overlap import come_up, wait
from .paging import in_head


@triton.jit
def _add_up(
    sums, summary, out, used,
    GROUP: tl.constexpr, GROUP_P2: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    AT_ONCE: tl.constexpr,
):  # fmt: skip
    """The result of a row's KV head from its splits' sums [used, GROUP, HEAD_DIM].

    summary: [used, 2, GROUP], the largest score and the sum of weights.
    """
    g, d, j = tl.arange(0, GROUP_P2), tl.arange(0, WIDTH), tl.arange(0, AT_ONCE)
    is_head = in_head((g < GROUP)[:, None], d, HEAD_DIM, WIDTH)
    top = tl.full([GROUP_P2], -1e30, tl.float32)
    weight = tl.zeros([GROUP_P2], tl.float32)
    total = tl.zeros([GROUP_P2, WIDTH], tl.float32)
    for first in range(0, used, AT_ONCE):
        split = first + j
        here = (split < used)[:, None] & (g < GROUP)[None, :]
        at = summary + split[:, None] * (2 * GROUP) + g[None, :]
        tops = tl.load(at, mask=here, other=float("-inf"), cache_modifier=".cg")
        weights = tl.load(at + GROUP, mask=here, other=0.0, cache_modifier=".cg")
        place = (split[:, None, None] * GROUP + g[None, :, None]) * HEAD_DIM + d[None, None, :]
        found = (split < used)[:, None, None] & is_head[None, :, :]
        some = tl.load(sums + place, mask=found, other=0.0, cache_modifier=".cg")
        new_top = tl.maximum(top, tl.max(tops, 0))
        shrink, factor = tl.exp2(top - new_top), tl.exp2(tops - new_top[None, :])
        weight = weight * shrink + tl.sum(factor * weights, 0)
        total = total * shrink[:, None] + tl.sum(factor[:, :, None] * some, 0)
        top = new_top
    place = out + g[:, None] * HEAD_DIM + d[None, :]
    result = total / weight[:, None]
    tl.store(place, result.to(out.dtype.element_ty), mask=is_head)


@triton.jit(
    do_not_specialize=["first_sequence", "splits"],
    do_not_specialize_on_alignment=["query_start", "context_len", "slots", "block_tables"],
)
def decode(
    q, keys, values, out, sums, summary, counters,
    query_start, context_len, slots, block_tables, table_width,
    first_sequence, splits, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, ALONE: tl.constexpr,
    GROUP_P2: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """Sequences first_sequence + i, of one row each; scale is for powers of two.

    ROWS: query heads of a KV head, padded for the tensor cores.  TILE: keys of
    one round.  STEP: a share is a multiple of it.  ALONE: splits is 1.  WIDTH: see
    paging.padded.
    """
    GROUP: tl.constexpr = HEADS // KV_HEADS
    come_up(OVERLAP)
    wait(OVERLAP)
    kv_head, split, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(context_len + first_sequence + sequence)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(length - WINDOW, 0)
    start = lowest // BLOCK_SIZE * BLOCK_SIZE
    share = tl.maximum(tl.cdiv(tl.cdiv(length - start, splits), STEP), 1) * STEP
    used = tl.cdiv(length - start, share)
    if split >= used:
        return
    begin = start + split * share
    end = tl.minimum(begin + share, length)

    r, d, j = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, TILE)
    table = block_tables + tl.load(slots + first_sequence + sequence).to(tl.int64) * table_width
    row = tl.load(query_start + first_sequence + sequence)
    first_head = (row * HEADS + kv_head * GROUP).to(tl.int64) * HEAD_DIM
    place = r[:, None] * HEAD_DIM + d[None, :]
    is_head = in_head((r < GROUP)[:, None], d, HEAD_DIM, WIDTH)
    query = tl.load(q + first_head + place, mask=is_head, other=0.0)

    top = tl.full([ROWS], -1e30, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    n = begin + j
    block = tl.load(table + n // BLOCK_SIZE, mask=n < end, other=0)
    for at in range(begin, end, TILE):
        n = at + j
        seen = n < end
        if WINDOW > 0:
            seen = seen & (n >= lowest)
        piece = block.to(tl.int64) * KV_HEADS + kv_head
        token = piece * (BLOCK_SIZE * HEAD_DIM) + n % BLOCK_SIZE * HEAD_DIM
        # The next round's blocks: their addresses are there when its loads are issued.
        block = tl.load(table + (n + TILE) // BLOCK_SIZE, mask=n + TILE < end, other=0)
        here = in_head(seen[:, None], d, HEAD_DIM, WIDTH)
        key = tl.load(keys + token[:, None] + d[None, :], mask=here, other=0.0)
        value = tl.load(values + token[:, None] + d[None, :], mask=here, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee") * scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(weights, 1)
        total = total * shrink[:, None]
        total = tl.dot(weights.to(value.dtype), value, total, input_precision="ieee")
        top = new_top

    if ALONE:
        divisor = tl.where(weight == 0.0, 1.0, weight)
        result = total / divisor[:, None]
        tl.store(out + first_head + place, result.to(out.dtype.element_ty), mask=is_head)
    else:
        if used == 1:
            divisor = tl.where(weight == 0.0, 1.0, weight)
            result = total / divisor[:, None]
            tl.store(out + first_head + place, result.to(out.dtype.element_ty), mask=is_head)
        else:
            mine = (sequence * KV_HEADS + kv_head).to(tl.int64)
            row_sums = sums + mine * splits * (GROUP * HEAD_DIM)
            row_summary = summary + mine * splits * (2 * GROUP)
            tl.store(row_sums + split * (GROUP * HEAD_DIM) + place, total, mask=is_head)
            tl.store(row_summary + split * (2 * GROUP) + r, top, mask=r < GROUP)
            tl.store(row_summary + split * (2 * GROUP) + GROUP + r, weight, mask=r < GROUP)
            # All threads have stored before one says so; who counts last sees all sums.
            tl.debug_barrier()
            finished = tl.atomic_add(counters + mine, 1, sem="acq_rel", scope="gpu")
            if finished == used - 1:
                tl.store(counters + mine, 0)
                _add_up(
                    row_sums, row_summary, out + first_head, used,
                    GROUP, GROUP_P2, HEAD_DIM, WIDTH, 8,
                )  # fmt: skip
