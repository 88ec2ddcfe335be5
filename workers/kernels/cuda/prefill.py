"""Attention of prefill chunks: their own keys are in the cache already, behind the prefix.

    grid  (kv_heads, tiles); a tile is ROWS rows = tokens x query heads of the KV head

Tiles are found in the kernel, for the host knows only the number of rows and
chunks: with n tokens to a tile, chunk c has the tile numbers from
query_start[c] // n + c on.  That leaves each chunk enough of them, and at most
one too many, which returns at once.  The last tiles have the most keys, so
they start first.

A captured launch has places for more chunks and rows than there are: chunks
without tokens, behind the others.  The tiles that these would need start last,
and return at once.

A row adds up the same keys in the same rounds wherever its tile begins, so
its bits do not depend on how a prompt was cut, nor on other rows.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .overlap import come_up, wait
from .paging import in_head


@triton.jit
def _count_tiles(query_start, num_chunks, TOKENS: tl.constexpr, AT_ONCE: tl.constexpr):
    """Tiles of the chunks up to the last that has tokens."""
    rows = tl.load(query_start + num_chunks)
    count = 0
    for first in range(0, num_chunks, AT_ONCE):
        chunk = first + tl.arange(0, AT_ONCE)
        start = tl.load(query_start + chunk, mask=chunk < num_chunks, other=2147483647)
        count += tl.sum((start < rows).to(tl.int32), 0)
    return rows // TOKENS + count


@triton.jit
def _chunk_of(query_start, num_chunks, tile, TOKENS: tl.constexpr, AT_ONCE: tl.constexpr):
    """The last chunk whose first tile number is at most `tile`."""
    count = 0
    for first in range(0, num_chunks, AT_ONCE):
        chunk = first + tl.arange(0, AT_ONCE)
        start = tl.load(query_start + chunk, mask=chunk < num_chunks, other=0)
        begun = (chunk < num_chunks) & (start // TOKENS + chunk <= tile)
        count += tl.sum(begun.to(tl.int32), 0)
    return count - 1


@triton.jit
def _rounds(
    query, position, top, weight, total, keys, values, table, kv_head, begin, end, lowest, scale,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Keys begin .. end into the rows' sums.  Without MASKED all rows see all of them."""
    d, j = tl.arange(0, WIDTH), tl.arange(0, TILE)
    n = begin + j
    block = tl.load(table + n // BLOCK_SIZE, mask=n < end, other=0)
    for at in range(begin, end, TILE):
        n = at + j
        inside = tl.full([TILE], True, tl.int1)
        if MASKED:
            inside = n < end
            if WINDOW > 0:
                inside = inside & (n >= lowest)
        piece = block.to(tl.int64) * KV_HEADS + kv_head
        at_key = piece * (BLOCK_SIZE * HEAD_DIM) + n % BLOCK_SIZE * HEAD_DIM
        # The next round's blocks: their addresses are there when its loads are issued.
        block = tl.load(table + (n + TILE) // BLOCK_SIZE, mask=n + TILE < end, other=0)
        here = in_head(inside[:, None], d, HEAD_DIM, WIDTH)
        key = tl.load(keys + at_key[:, None] + d[None, :], mask=here, other=0.0)
        value = tl.load(values + at_key[:, None] + d[None, :], mask=here, other=0.0)
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
        if MASKED:
            seen = n[None, :] <= position[:, None]
            if WINDOW > 0:
                seen = seen & (n[None, :] > position[:, None] - WINDOW)
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        # Fused by name: the compiler would do it here and not there, and bits would differ.
        weights = tl.exp2(tl.fma(scores, scale, -new_top[:, None]))
        shrink = tl.exp2(top - new_top)
        weight = weight * shrink + tl.sum(weights, 1)
        total = total * shrink[:, None]
        total = tl.dot(weights.to(value.dtype), value, total, input_precision="ieee")
        top = new_top
    return top, weight, total


@triton.jit(
    do_not_specialize=["num_chunks"],
    do_not_specialize_on_alignment=["query_start", "context_len", "slots", "block_tables"],
)
def prefill(
    q, keys, values, out, query_start, context_len, slots, block_tables, table_width,
    num_chunks, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """scale is for powers of two; TILE: keys of one round; WIDTH: see paging.padded."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    TOKENS: tl.constexpr = ROWS // GROUP
    come_up(OVERLAP)
    wait(OVERLAP)
    kv_head = tl.program_id(0)
    tile = _count_tiles(query_start, num_chunks, TOKENS, 128) - 1 - tl.program_id(1)
    if tile < 0:
        return
    chunk = _chunk_of(query_start, num_chunks, tile, TOKENS, 128)
    row = tl.load(query_start + chunk)
    tokens = tl.load(query_start + chunk + 1) - row
    first = (tile - row // TOKENS - chunk) * TOKENS
    if first >= tokens:
        return

    length = tl.load(context_len + chunk)
    prefix = length - tokens
    table = block_tables + tl.load(slots + chunk).to(tl.int64) * table_width
    r, d = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    token = first + r // GROUP
    position = prefix + token
    head = (row + token) * HEADS + kv_head * GROUP + r % GROUP
    place = head.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
    is_row = in_head(((r < TOKENS * GROUP) & (token < tokens))[:, None], d, HEAD_DIM, WIDTH)
    query = tl.load(q + place, mask=is_row, other=0.0)

    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(prefix + first - WINDOW + 1, 0)
    end = tl.minimum(prefix + first + TOKENS, length)
    top = tl.full([ROWS], -1e30, tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    begin = lowest // TILE * TILE
    if WINDOW == 0:
        # Up to the tile's first token nothing is masked.
        whole = (prefix + first + 1) // TILE * TILE
        top, weight, total = _rounds(
            query, position, top, weight, total, keys, values, table, kv_head, begin, whole,
            lowest, scale, KV_HEADS, HEAD_DIM, WIDTH, BLOCK_SIZE, WINDOW, TILE, False,
        )  # fmt: skip
        begin = whole
    top, weight, total = _rounds(
        query, position, top, weight, total, keys, values, table, kv_head, begin, end,
        lowest, scale, KV_HEADS, HEAD_DIM, WIDTH, BLOCK_SIZE, WINDOW, TILE, True,
    )  # fmt: skip

    divisor = tl.where(weight == 0.0, 1.0, weight)
    result = total / divisor[:, None]
    tl.store(out + place, result.to(out.dtype.element_ty), mask=is_row)
