"""Where the rows, keys and values of an attention tile are.

A tile is some consecutive rows of one sequence; an item of a launch is a tile
and a KV head.  This file cuts a batch into tiles and turns (item, chunk of
keys) into addresses; attention.py does the arithmetic.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from ...machine_code import native
from .products import WIDE
from .simd import LANES, load_i64, pointer_i32, pointer_u16, store_i64
from .threads import Parameters

CHUNK = WIDE * LANES
"""Keys of one round of the online softmax; chunks start at multiples of it."""
GROUP_TABLE = 8 * WIDE
"""Offset of the values' addresses in a chunk's tables, after those of the keys."""
TABLES_BYTES = 2 * GROUP_TABLE

LAYOUT = Parameters("16qd")
(
    Q, KEYS, VALUES, OUT, TILES, ITEMS, QUERY_START, CONTEXT_LEN, SLOTS, TABLES, TABLE_ROW,
    HEADS, KV_HEADS, HEAD_DIM, GROUPS, WINDOW, SCALE,
) = range(0, 136, 8)  # fmt: skip
"""Parameters of a launch. GROUPS: groups of 16 tokens in a block."""


@native("UniTuple(int64, 2)(int64, int64, int64, int64, int64)")
def cut(query_start: int, context_len: int, sequences: int, tokens: int, tiles: int):  # type: ignore[no-untyped-def]
    """Writes tiles (sequence, first token, tokens); returns their number and the pairs attended."""
    starts, contexts = pointer_i32(query_start), pointer_i32(context_len)
    out = pointer_i32(tiles)
    count, pairs = 0, 0
    for s in range(sequences):
        length = starts[s + 1] - starts[s]
        pairs += length * np.int64(contexts[s])
        for first in range(0, length, tokens):
            out[3 * count] = s
            out[3 * count + 1] = first
            out[3 * count + 2] = min(tokens, length - first)
            count += 1
    return count, pairs


@njit(nogil=True)
def locate(p: int, item: int):  # type: ignore[no-untyped-def]
    """(first row, tokens, position of the first row, first key seen, address of the block table)"""
    tile = pointer_i32(load_i64(p + TILES) + item // load_i64(p + KV_HEADS) * 12)
    sequence, skipped, tokens = np.int64(tile[0]), np.int64(tile[1]), np.int64(tile[2])
    starts = pointer_i32(load_i64(p + QUERY_START))
    start, after = np.int64(starts[sequence]), np.int64(starts[sequence + 1])
    context = np.int64(pointer_i32(load_i64(p + CONTEXT_LEN))[sequence])
    position, window = context - (after - start) + skipped, load_i64(p + WINDOW)
    begin = max(position - window + 1, 0) if window > 0 else 0
    slot = np.int64(pointer_i32(load_i64(p + SLOTS))[sequence])
    blocks = load_i64(p + TABLES) + slot * load_i64(p + TABLE_ROW) * 4
    return start + skipped, tokens, position, begin, blocks


@njit(nogil=True)
def look_up(p, blocks, head, chunk, begin, end, size, tables):  # type: ignore[no-untyped-def]
    """Writes the addresses of a chunk's groups of keys and of values, of `size` byte elements.

    Groups that no row of the tile sees (before key `begin`, from `end` on)
    are not looked up: others stand in for them.
    """
    head_dim, groups = load_i64(p + HEAD_DIM), load_i64(p + GROUPS)
    width = (head_dim + LANES - 1) // LANES * LANES
    first = max(begin - chunk, 0) // LANES
    last = min((end - chunk + LANES - 1) // LANES, WIDE) - 1
    entries = pointer_i32(blocks)
    for g in range(WIDE):
        number = chunk // LANES + min(max(g, first), last)
        place = np.int64(entries[number // groups]) * load_i64(p + KV_HEADS) + head
        place = place * groups + number % groups
        keys = load_i64(p + KEYS) + place * head_dim * size * LANES
        values = load_i64(p + VALUES) + place * width * size * LANES
        store_i64(tables + 8 * g, keys)
        store_i64(tables + GROUP_TABLE + 8 * g, values)


@njit(nogil=True)
def look_ahead(p, item, blocks, chunk, begin, end, size, tables):  # type: ignore[no-untyped-def]
    """The addresses of what is needed after a chunk: the next one, of this item or the next."""
    kv_heads = load_i64(p + KV_HEADS)
    if chunk + CHUNK < end:
        look_up(p, blocks, item % kv_heads, chunk + CHUNK, begin, end, size, tables)
    elif item + 1 < load_i64(p + ITEMS):
        _, tokens, position, begin, blocks = locate(p, item + 1)
        chunk, end = begin // CHUNK * CHUNK, position + tokens
        look_up(p, blocks, (item + 1) % kv_heads, chunk, begin, end, size, tables)
    else:
        look_up(p, blocks, item % kv_heads, chunk, begin, end, size, tables)


@njit(nogil=True)
def copy_values(source: int, to: int, is_bf16: int, width: int, keep: int) -> None:
    """The first `keep` tokens of a group of values, zeros for the others."""
    a, b = pointer_u16(source), pointer_u16(to)
    for token in range(LANES):
        if is_bf16:
            at = (token // 2) * 2 * width + token % 2
            for i in range(width):
                b[at + 2 * i] = a[at + 2 * i] if token < keep else 0
        else:
            at = token * 2 * width
            for i in range(2 * width):
                b[at + i] = a[at + i] if token < keep else 0
