"""Searching for a key bit by bit: the largest key that enough weight reaches.

No sort: two bits cost a few sums over the keys, which are in registers (or, for a
row that nothing narrows down, a bit costs a sum over keys that are read again).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .arithmetic import KEY_BITS, LOWEST_FINITE, from_order, load_tile, logit_mass, order


@triton.jit
def largest_reaching(keys, weights, target):
    """Largest key with sum(weights where keys >= key) >= target; 0 where all do not reach it.

    keys: int64 [n] (see order).  weights: int64 [n], 0 for what does not count.  target >= 1.
    Two bits a turn: four sums take hardly longer than one.
    """
    step = tl.arange(0, 4).to(tl.int64)
    key = tl.full([], 0, tl.int64)
    for turn in range(KEY_BITS // 2):
        shift = KEY_BITS - 2 - 2 * turn
        candidates = key + (step << shift)
        heavy = tl.where(keys[None, :] >= candidates[:, None], weights[None, :], 0)
        reached = (tl.sum(heavy, 1) >= target) & (step > 0)
        key += tl.sum(reached.to(tl.int64), 0) << shift
    return key


@triton.jit
def kth_best(keys, valid, k):
    """The k-th best logit (float32) of at least k valid keys; the lowest finite one for fewer."""
    key = largest_reaching(keys, valid.to(tl.int64), k + tl.full([], 0, tl.int64))
    return tl.where(key == 0, LOWEST_FINITE, from_order(key))


@triton.jit
def row_weight(
    logits,
    row,
    best,
    inverse,
    lowest_key,
    width,
    row_stride,
    segment_stride,
    segments,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Number, or mass, of the finite tokens of a row with keys from lowest_key on."""
    total = tl.full([], 0, tl.int64)
    block = tl.full([], 0, tl.int32)
    while block < segments * tl.cdiv(width, BLOCK):
        z, _ = load_tile(logits, row, block, width, row_stride, segment_stride, BLOCK)
        counts = (z > -float("inf")) & (order(z) >= lowest_key)
        if BY_MASS:
            total += tl.sum(tl.where(counts, logit_mass(z, best, inverse), 0), 0)
        else:
            total += tl.sum(counts.to(tl.int64), 0)
        block += 1
    return total


@triton.jit
def row_largest_reaching(
    logits,
    row,
    best,
    inverse,
    target,
    width,
    row_stride,
    segment_stride,
    segments,
    BY_MASS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """As largest_reaching, over the finite tokens of a whole row; slow, and needs no room."""
    key = tl.full([], 0, tl.int64)
    for bit in range(KEY_BITS):
        candidate = key | (tl.full([], 1, tl.int64) << (KEY_BITS - 1 - bit))
        reached = row_weight(
            logits,
            row,
            best,
            inverse,
            candidate,
            width,
            row_stride,
            segment_stride,
            segments,
            BY_MASS,
            BLOCK,
        )
        key = tl.where(reached >= target, candidate, key)
    return key
