"""What chunks see of a KV cache in 12 bits (e4m7_cache.py), in bfloat16, as prefill.py reads it.

    grid  (programs, chunks); each program takes some of the pieces of a chunk's blocks

Many tiles of rows read the same keys.  Unpacked once for all of them, these get from memory to
the tensor cores without passing registers; unpacked by every tile, a prompt of 8,192 tokens
takes 1.6 times as long.  The numbers go to one cache for all layers, which is read before the
next layer writes it, each block to its own place: chunks with a block in common write the same.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...engine.batch import StepBatch
from ..interface import KVLayer
from .e4m7_cache import (
    load_narrow,
    load_narrow_powers,
    power_of_key,
    power_of_value,
    unpack_halves,
    widened,
)
from .overlap import come_up, overlapped, wait

_ROWS = 16
"""Of a piece: tokens of a head; every block is some of them."""
_PROGRAMS = 16
"""For each multiprocessor, of two warps."""


def widen(
    narrow: KVLayer, wide: KVLayer, batch: StepBatch, chunks: int, window: int, processors: int
) -> None:
    """What the first `chunks` sequences can see, of one layer."""
    _, kv_heads, block_size, head_dim = wide.keys.shape
    pieces = kv_heads * block_size // _ROWS
    most = batch.block_tables.shape[1] * pieces
    programs = max(1, min(most, -(-_PROGRAMS * processors // chunks)))
    _widen[(programs, chunks)](
        narrow.keys,
        wide.keys,
        wide.values,
        batch.query_start,
        batch.context_len,
        batch.slots,
        batch.block_tables,
        batch.block_tables.stride(0),
        KV_HEADS=kv_heads,
        BLOCK_SIZE=block_size,
        HEAD_DIM=head_dim,
        WINDOW=window,
        ROWS=_ROWS,
        ASSEMBLY=narrow.keys.is_cuda,
        num_warps=2,
        **overlapped(narrow.keys.device),
    )


@triton.jit
def _store(target, block, row, low, high, powers, HEAD_DIM: tl.constexpr):
    """Both halves of a piece's rows."""
    HALF: tl.constexpr = HEAD_DIM // 2
    place = target + block + row[:, None] * HEAD_DIM + tl.arange(0, HALF)[None, :]
    tl.store(place, widened(low, powers[:, None]))
    tl.store(place + HALF, widened(high, powers[:, None]))


@triton.jit(
    do_not_specialize_on_alignment=["query_start", "context_len", "slots", "block_tables"],
)
def _widen(
    narrow, keys, values, query_start, context_len, slots, block_tables, table_width,
    KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
    WINDOW: tl.constexpr, ROWS: tl.constexpr, OVERLAP: tl.constexpr, ASSEMBLY: tl.constexpr,
):  # fmt: skip
    PIECES: tl.constexpr = KV_HEADS * BLOCK_SIZE // ROWS
    come_up(OVERLAP)
    wait(OVERLAP)
    chunk = tl.program_id(1)
    tokens = tl.load(query_start + chunk + 1) - tl.load(query_start + chunk)
    if tokens == 0:  # A place for a chunk that is not there.
        return
    length = tl.load(context_len + chunk)
    lowest = 0
    if WINDOW > 0:
        lowest = tl.maximum(length - tokens - WINDOW + 1, 0)
    table = block_tables + tl.load(slots + chunk).to(tl.int64) * table_width
    begin, end = lowest // BLOCK_SIZE * PIECES, tl.cdiv(length, BLOCK_SIZE) * PIECES
    for piece in range(begin + tl.program_id(0), end, tl.num_programs(0)):
        block = tl.load(table + piece // PIECES)
        row = piece % PIECES * ROWS + tl.arange(0, ROWS)
        key = load_narrow(narrow, block, row, False, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        value = load_narrow(narrow, block, row, True, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        powers = load_narrow_powers(narrow, block, row, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
        to = block.to(tl.int64) * (KV_HEADS * BLOCK_SIZE * HEAD_DIM)
        low, high = unpack_halves(key[0], key[1], key[2], ASSEMBLY)
        _store(keys, to, row, low, high, power_of_key(powers), HEAD_DIM)
        low, high = unpack_halves(value[0], value[1], value[2], ASSEMBLY)
        _store(values, to, row, low, high, power_of_value(powers), HEAD_DIM)
