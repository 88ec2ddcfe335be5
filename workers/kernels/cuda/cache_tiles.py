"""What a decode's attention reads of the paged cache in a round, and computes, in either format.

As numbers, a round's keys or values are one tile [n, WIDTH].  In 12 bits (e4m7_cache.py) they
are read as they lie in memory and unpacked in the registers that the tensor cores take them
from: keys as two halves of a head, values as the even and the odd columns of each half, for
there a register has the same column of two tokens.  A sum over values then has four parts, and
`joined` puts them in order when all rounds are done.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .e4m7_cache import (
    QUERY_FACTOR,
    SCORE_FACTOR,
    SUM_FACTOR,
    WEIGHT_FACTOR,
    load_narrow,
    load_narrow_powers,
    power_of_key,
    power_of_value,
    unpack_halves,
    unpack_pairs,
)
from .paging import in_head


@triton.jit
def load_query(q, row, mask, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr, E4M7: tl.constexpr):
    """Heads that begin at q + row [ROWS], as `product` takes them."""
    if E4M7:
        HALF: tl.constexpr = HEAD_DIM // 2
        i = tl.arange(0, HALF)
        low = tl.load(q + row[:, None] + i[None, :], mask=mask[:, None], other=0.0)
        high = tl.load(q + row[:, None] + HALF + i[None, :], mask=mask[:, None], other=0.0)
        dtype = q.dtype.element_ty
        query = (
            (low.to(tl.float32) * QUERY_FACTOR).to(dtype),
            (high.to(tl.float32) * QUERY_FACTOR).to(dtype),
        )
    else:
        d = tl.arange(0, WIDTH)
        here = in_head(mask[:, None], d, HEAD_DIM, WIDTH)
        query = tl.load(q + row[:, None] + d[None, :], mask=here, other=0.0)
    return query


@triton.jit
def load_powers(
    keys, block, n, kv_head, mask,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_SIZE: tl.constexpr, E4M7: tl.constexpr,
):  # fmt: skip
    """Of tokens n, which are in these blocks, for `product` and `add`."""
    powers = 0
    if E4M7:
        row = kv_head * BLOCK_SIZE + n % BLOCK_SIZE
        powers = load_narrow_powers(keys, block, row, mask, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    return powers


@triton.jit
def load_tile(
    cache, block, n, kv_head, mask, VALUES: tl.constexpr,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, E4M7: tl.constexpr,
):  # fmt: skip
    """As load_powers: keys, or values."""
    if E4M7:
        row = kv_head * BLOCK_SIZE + n % BLOCK_SIZE
        tile = load_narrow(cache, block, row, mask, VALUES, VALUES, KV_HEADS, BLOCK_SIZE, HEAD_DIM)
    else:
        d = tl.arange(0, WIDTH)
        piece = block.to(tl.int64) * KV_HEADS + kv_head
        token = piece * (BLOCK_SIZE * HEAD_DIM) + n % BLOCK_SIZE * HEAD_DIM
        here = in_head(mask[:, None], d, HEAD_DIM, WIDTH)
        tile = tl.load(cache + token[:, None] + d[None, :], mask=here, other=0.0)
    return tile


@triton.jit
def product(query, key, powers, E4M7: tl.constexpr, ASSEMBLY: tl.constexpr):
    """float32 [ROWS, n]: of queries and keys."""
    if E4M7:
        low, high = unpack_halves(key[0], key[1], key[2], ASSEMBLY)
        scores = tl.dot(query[0], tl.trans(low))
        scores = tl.dot(query[1], tl.trans(high), scores)
        scores = scores * (power_of_key(powers) * SCORE_FACTOR)[None, :]
    else:
        scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    return scores


@triton.jit
def no_sum(ROWS: tl.constexpr, WIDTH: tl.constexpr, E4M7: tl.constexpr):
    """Zero, as `add` takes and returns it."""
    if E4M7:
        part = tl.zeros([ROWS, WIDTH // 4], tl.float32)
        total = (part, part, part, part)
    else:
        total = tl.zeros([ROWS, WIDTH], tl.float32)
    return total


@triton.jit
def add(total, shrink, weights, value, powers, E4M7: tl.constexpr, ASSEMBLY: tl.constexpr):
    """total * shrink + weights [ROWS, n] x values."""
    if E4M7:
        factor = power_of_value(powers) * WEIGHT_FACTOR
        weights = (weights * factor[None, :]).to(tl.bfloat16)
        a, b, c, d = unpack_pairs(value[0], value[1], value[2], ASSEMBLY)
        total = (
            tl.dot(weights, a, total[0] * shrink[:, None]),
            tl.dot(weights, b, total[1] * shrink[:, None]),
            tl.dot(weights, c, total[2] * shrink[:, None]),
            tl.dot(weights, d, total[3] * shrink[:, None]),
        )
    else:
        total = total * shrink[:, None]
        total = tl.dot(weights.to(value.dtype), value, total, input_precision="ieee")
    return total


@triton.jit
def joined(total, ROWS: tl.constexpr, WIDTH: tl.constexpr, E4M7: tl.constexpr):
    """float32 [ROWS, WIDTH]."""
    if E4M7:
        low, high = tl.interleave(total[0], total[1]), tl.interleave(total[2], total[3])
        halves = tl.permute(tl.join(low, high), 0, 2, 1)
        total = tl.reshape(halves, [ROWS, WIDTH]) * SUM_FACTOR
    return total
