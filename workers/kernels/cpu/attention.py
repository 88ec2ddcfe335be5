"""Causal attention over the paged cache: prefill chunks and decodes in one launch.

The rows of a sequence are cut into tiles; an item is one tile and one KV
head, with the query heads of its group, so each key and value is read once
for all of them.  A tile walks the keys in chunks of 64 at fixed positions
(multiples of 64) with an online softmax:

    scores [rows, 64] = q x keys         products.py, split over 4 groups of 16 keys
    p, rescale                            float32, row by row
    sums [rows, head_dim] += p x values   products.py

What a row adds up, and in which order, depends on its position alone: a
masked key adds an exact zero, a wholly masked chunk nothing.  So tiles,
prefill chunks and threads never change a result, bit for bit.

Nothing past the tile's last position gets into a sum: scores of such keys are
replaced, and their values are left out or taken as zero, since 0 x NaN is NaN.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit

from ...engine.batch import StepBatch
from ...machine_code import ItemFunction, part
from ..interface import KVLayer
from .paging import MAX_HEAD_DIM
from .products import (
    MAX_ROWS,
    WIDE,
    narrow_bf16,
    narrow_f32,
    split_bf16,
    split_f32,
    wide_bf16,
    wide_f32,
)
from .rows import write_row
from .simd import (
    LANES,
    VEC_BYTES,
    exp2,
    fetch,
    load_f64,
    load_i64,
    pointer_f32,
    pointer_u16,
    store_i64,
)
from .threads import Team
from .tiles import (
    CHUNK,
    GROUP_TABLE,
    HEAD_DIM,
    HEADS,
    KV_HEADS,
    LAYOUT,
    OUT,
    SCALE,
    TABLES_BYTES,
    WINDOW,
    Q,
    copy_values,
    cut,
    locate,
    look_ahead,
    look_up,
)
from .vectors import (
    vec_add,
    vec_fma,
    vec_keep,
    vec_load,
    vec_max,
    vec_splat,
    vec_store,
    vec_store_bf16,
    vec_sum,
    vec_top,
)

TILE_ROWS = 8 * 6
"""Rows (tokens x query heads of a group) that share one pass over the keys."""
_WORTH_SHARING = 1 << 18
"""Multiply-adds that cost about what waking a helper does."""
_NEVER = np.float32(-1e30)

# Scratch of a thread, in bytes.
_NOW = 0
_AHEAD = _NOW + TABLES_BYTES
_VALUE_TABLE = _AHEAD + TABLES_BYTES
_VALUE_TABLE_AHEAD = _VALUE_TABLE + 8 * WIDE
_ZEROS = _VALUE_TABLE_AHEAD + 8 * WIDE
_TOP = _ZEROS + WIDE * VEC_BYTES
_TOTAL = _TOP + 4 * TILE_ROWS
_QUERIES = _TOTAL + 4 * TILE_ROWS
_SCORES = _QUERIES + 4 * TILE_ROWS * MAX_HEAD_DIM
_WEIGHTS = _SCORES + 4 * TILE_ROWS * CHUNK
_SUMS = _WEIGHTS + 4 * TILE_ROWS * CHUNK
_LAST_GROUP = _SUMS + 4 * TILE_ROWS * MAX_HEAD_DIM


@njit(nogil=True)
def _copy(source: int, to: int, count: int) -> None:
    """`count` 16-bit halves."""
    a, b = pointer_u16(source), pointer_u16(to)
    for i in range(count):
        b[i] = a[i]


@njit(nogil=True)
def _soften(scratch, row, begin, end, scale, is_bf16, width):  # type: ignore[no-untyped-def]
    """One row of scores -> weights; its sums are rescaled when a larger score turns up.

    Keys begin .. end-1 of the chunk are visible (begin may be below 0, end above CHUNK).
    """
    scores = scratch + _SCORES + row * (4 * CHUNK)
    tops, totals = pointer_f32(scratch + _TOP), pointer_f32(scratch + _TOTAL)
    a, b = vec_load(scores), vec_load(scores + VEC_BYTES)
    c, d = vec_load(scores + 2 * VEC_BYTES), vec_load(scores + 3 * VEC_BYTES)
    if begin > 0 or end < CHUNK:
        a = vec_keep(a, begin, end)
        b = vec_keep(b, begin - LANES, end - LANES)
        c = vec_keep(c, begin - 2 * LANES, end - 2 * LANES)
        d = vec_keep(d, begin - 3 * LANES, end - 3 * LANES)
    top = vec_top(vec_max(vec_max(a, b), vec_max(c, d))) * scale
    if top > tops[row]:
        shrink = exp2(np.float32(tops[row] - top))
        tops[row] = top
        totals[row] *= shrink
        sums = pointer_f32(scratch + _SUMS + row * width * 4)
        for i in range(width):
            sums[i] *= shrink
    factor, offset = vec_splat(scale), vec_splat(-tops[row])
    a, b = exp2(vec_fma(a, factor, offset)), exp2(vec_fma(b, factor, offset))
    c, d = exp2(vec_fma(c, factor, offset)), exp2(vec_fma(d, factor, offset))
    totals[row] += vec_sum(vec_add(vec_add(a, b), vec_add(c, d)))
    if is_bf16:
        weights = scratch + _WEIGHTS + row * (2 * CHUNK)
        vec_store_bf16(weights, a)
        vec_store_bf16(weights + 2 * LANES, b)
        vec_store_bf16(weights + 4 * LANES, c)
        vec_store_bf16(weights + 6 * LANES, d)
    else:
        weights = scratch + _WEIGHTS + row * (4 * CHUNK)
        vec_store(weights, a)
        vec_store(weights + VEC_BYTES, b)
        vec_store(weights + 2 * VEC_BYTES, c)
        vec_store(weights + 3 * VEC_BYTES, d)


@njit(nogil=True)
def _clear_weights(scratch: int, row: int, is_bf16: int) -> None:
    """Weights of a row that sees nothing of the chunk."""
    halves = CHUNK if is_bf16 else 2 * CHUNK
    weights = pointer_u16(scratch + _WEIGHTS + row * 2 * halves)
    for i in range(halves):
        weights[i] = 0


def _make_score(name: str, size: int, product: Any) -> Any:
    """For elements of `size` bytes."""

    @part(name)
    def score(scratch: int, now: int, ahead: int, rows: int, head_dim: int) -> None:
        """Scores of the tile's rows against a chunk of keys."""
        tiles = (rows + MAX_ROWS - 1) // MAX_ROWS
        row = 0
        for done in range(tiles):
            some = (rows - row + tiles - done - 1) // (tiles - done)
            product(
                some, scratch + _QUERIES + row * head_dim * size, head_dim * size,
                now, ahead, 1, head_dim * size // 4, VEC_BYTES,
                scratch + _ZEROS, 0, scratch + _SCORES + row * (4 * CHUNK), 4 * CHUNK,
            )  # fmt: skip
            row += some

    return score


def _make_add_values(name: str, size: int, product: Any) -> Any:
    """For elements of `size` bytes and as many columns as `product` makes."""

    @part(name)
    def add_values(scratch, now, ahead, rows, first, last, column, width):  # type: ignore[no-untyped-def]
        """Adds weights x values of groups first .. last-1 to the sums, from `column` on."""
        for g in range(WIDE):
            at = scratch + _VALUE_TABLE + 8 * g
            store_i64(at, load_i64(now + GROUP_TABLE + 8 * g) + column * 4)
            at = scratch + _VALUE_TABLE_AHEAD + 8 * g
            store_i64(at, load_i64(ahead + GROUP_TABLE + 8 * g) + column * 4)
        tiles = (rows + MAX_ROWS - 1) // MAX_ROWS
        row = 0
        for done in range(tiles):
            some = (rows - row + tiles - done - 1) // (tiles - done)
            sums = scratch + _SUMS + (row * width + column) * 4
            product(
                some, scratch + _WEIGHTS + (row * CHUNK + first * LANES) * size, CHUNK * size,
                scratch + _VALUE_TABLE + 8 * first, scratch + _VALUE_TABLE_AHEAD + 8 * first,
                last - first, LANES * size // 4, width * 4,
                sums, width * 4, sums, width * 4,
            )  # fmt: skip
            row += some

    return add_values


@njit(nogil=True)
def _start(p, scratch, first_head, tokens, head_bytes, width):  # type: ignore[no-untyped-def]
    """Gathers the tile's queries and clears what it accumulates."""
    heads = load_i64(p + HEADS)
    share = heads // load_i64(p + KV_HEADS)
    for t in range(tokens):
        _copy(
            load_i64(p + Q) + (first_head + t * heads) * head_bytes,
            scratch + _QUERIES + t * share * head_bytes,
            share * head_bytes // 2,
        )
    tops, totals = pointer_f32(scratch + _TOP), pointer_f32(scratch + _TOTAL)
    for r in range(tokens * share):
        tops[r] = _NEVER
        totals[r] = 0
    sums, zeros = pointer_f32(scratch + _SUMS), pointer_f32(scratch + _ZEROS)
    for i in range(tokens * share * width):
        sums[i] = 0
    for i in range(CHUNK):
        zeros[i] = 0


@njit(nogil=True)
def _finish(p, scratch, first_head, rows, size):  # type: ignore[no-untyped-def]
    """Divides the sums by the total weights and writes the results."""
    heads, head_dim = load_i64(p + HEADS), load_i64(p + HEAD_DIM)
    share = heads // load_i64(p + KV_HEADS)
    width = (head_dim + LANES - 1) // LANES * LANES
    totals = pointer_f32(scratch + _TOTAL)
    for r in range(rows):
        sums = pointer_f32(scratch + _SUMS + r * width * 4)
        # Scores of -inf alone: NaN, as in PyTorch.
        inverse = np.float32(1) / totals[r] if totals[r] > 0 else np.float32(np.nan)
        for i in range(head_dim):
            sums[i] *= inverse
        place = first_head + (r // share) * heads + r % share
        out = load_i64(p + OUT) + place * head_dim * size
        write_row(scratch + _SUMS + r * width * 4, size == 2, head_dim, out)


def _make_tile(name: str, size: int, score: Any, add_wide: Any, add_narrow: Any) -> Any:
    """The item for elements of `size` bytes: one tile and KV head."""

    @part(name)
    def tile_and_head(p: int, item: int, scratch: int) -> None:
        heads, kv_heads = load_i64(p + HEADS), load_i64(p + KV_HEADS)
        head_dim, window = load_i64(p + HEAD_DIM), load_i64(p + WINDOW)
        scale = np.float32(load_f64(p + SCALE))
        share, head = heads // kv_heads, item % kv_heads
        width = (head_dim + LANES - 1) // LANES * LANES
        start, tokens, position, begin, blocks = locate(p, item)
        end, rows, first_head = position + tokens, tokens * share, start * heads + head * share

        _start(p, scratch, first_head, tokens, head_dim * size, width)
        now, ahead = scratch + _NOW, scratch + _AHEAD
        look_up(p, blocks, head, begin // CHUNK * CHUNK, begin, end, size, now)
        for chunk in range(begin // CHUNK * CHUNK, end, CHUNK):
            look_ahead(p, item, blocks, chunk, begin, end, size, ahead)
            first = max(begin - chunk, 0) // LANES
            last = min((end - chunk + LANES - 1) // LANES, WIDE)
            keep = end - chunk - (last - 1) * LANES
            if keep < LANES:
                at = now + GROUP_TABLE + 8 * (last - 1)
                copy_values(load_i64(at), scratch + _LAST_GROUP, size == 2, width, keep)
                store_i64(at, scratch + _LAST_GROUP)
            score(scratch, now, ahead, rows, head_dim)
            for r in range(rows):
                until = position + r // share + 1 - chunk
                since = until - window if window > 0 else 0
                if until > 0 and since < CHUNK:
                    _soften(scratch, r, since, until, scale, size == 2, width)
                else:
                    _clear_weights(scratch, r, size == 2)
            column = 0
            while width - column >= CHUNK:
                add_wide(scratch, now, ahead, rows, first, last, column, width)
                column += CHUNK
            while column < width:
                add_narrow(scratch, now, ahead, rows, first, last, column, width)
                column += LANES
            for g in range(last, WIDE):
                fetch(load_i64(ahead + GROUP_TABLE + 8 * g), LANES * size * width)
            now, ahead = ahead, now
        _finish(p, scratch, first_head, rows, size)

    return tile_and_head


# The machine code on disk belongs to these two: numba can only keep that of
# functions that close over nothing and pass no functions along.
_tile_bf16 = _make_tile(
    "bf16",
    2,
    _make_score("bf16", 2, split_bf16),
    _make_add_values("wide_bf16", 2, wide_bf16),
    _make_add_values("narrow_bf16", 2, narrow_bf16),
)
_tile_f32 = _make_tile(
    "f32",
    4,
    _make_score("f32", 4, split_f32),
    _make_add_values("wide_f32", 4, wide_f32),
    _make_add_values("narrow_f32", 4, narrow_f32),
)


def _attention_bf16(p: int, item: int, scratch: int) -> None:
    _tile_bf16(p, item, scratch)


def _attention_f32(p: int, item: int, scratch: int) -> None:
    _tile_f32(p, item, scratch)


attention_bf16 = ItemFunction(_attention_bf16)
attention_f32 = ItemFunction(_attention_f32)

_LOG2E = 1.4426950408889634


class Attention:
    """The launch of an attention step, with the memory its list of tiles takes."""

    def __init__(self) -> None:
        self._make_room(256)

    def _make_room(self, rows: int) -> None:
        self._tiles = np.zeros((rows, 3), np.int32)
        self._tiles_at = self._tiles.ctypes.data

    def __call__(
        self,
        team: Team,
        q: torch.Tensor,
        kv: KVLayer,
        batch: StepBatch,
        scale: float,
        window: int,
    ) -> torch.Tensor:
        """See Kernels.attention."""
        rows, heads, head_dim = q.shape
        kv_heads = kv.keys.shape[1]
        share = heads // kv_heads
        if share > TILE_ROWS:
            raise ValueError(
                f"{heads} query heads for {kv_heads} KV heads: a tile has room for {TILE_ROWS}"
                " query heads of a KV head"
            )
        if rows > len(self._tiles):
            self._make_room(2 * rows)
        out = q.new_empty(rows, heads * head_dim)
        tiles = self._tiles_at
        query_start, context_len = batch.query_start.data_ptr(), batch.context_len.data_ptr()
        count, pairs = cut(
            query_start, context_len, batch.slots.shape[0], max(1, TILE_ROWS // share), tiles
        )
        team.launch(
            attention_bf16 if q.dtype == torch.bfloat16 else attention_f32,
            count * kv_heads,
            pairs * heads * head_dim > _WORTH_SHARING,
            LAYOUT,
            q.data_ptr(),
            kv.keys.data_ptr(),
            kv.values.data_ptr(),
            out.data_ptr(),
            tiles,
            count * kv_heads,
            query_start,
            context_len,
            batch.slots.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.block_tables.shape[1],
            heads,
            kv_heads,
            head_dim,
            kv.keys.shape[2],
            window,
            scale * _LOG2E,
        )
        return out
