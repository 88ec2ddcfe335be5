"""The buckets in which a WIDE row's boundaries lie: a histogram of counts and masses.

Buckets are equal parts of the range from the best logit to LOW (rows.py); the
mass of what is below is kept as one sum.  All sums are of integers, so the
order of the atomic additions does not matter.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...kernels.cuda.overlap import come_up, wait
from .arithmetic import bucket_of, load_tile, logit_mass, step_row
from .rows import (
    ABOVE,
    BEST,
    BUCKET_K,
    BUCKET_P_FIRST,
    BUCKET_P_LAST,
    EXHAUSTIVE,
    FLOATS,
    FLOOR,
    INTS,
    LONGS,
    LOW,
    MASS_ABOVE,
    MASS_BEFORE,
    MASS_REST,
    MODE,
    NEEDED,
    SCALE,
    WEIGHS,
    WIDE,
)


@triton.jit
def histogram(
    logits,
    tile_max,
    slots,
    temperatures,
    floats,
    ints,
    longs,
    hist_count,
    hist_mass,
    which,
    width,
    row_stride,
    segment_stride,
    tiles,
    TILE: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr,
    BUCKETS: tl.constexpr,
    LISTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Adds up hist_count (int32) and hist_mass (int64) [rows, BUCKETS], where they are asked for.

    Grid as scan's.
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    if tl.load(ints + row * INTS + MODE) == WIDE:
        temperature = tl.load(temperatures + tl.load(slots + step_row(which, row, LISTED)))
        inverse = 1.0 / temperature.to(tl.float64)
        best = tl.load(floats + row * FLOATS + BEST)
        low = tl.load(floats + row * FLOATS + LOW)
        scale = tl.load(floats + row * FLOATS + SCALE)
        floor = tl.load(floats + row * FLOATS + FLOOR)
        # Each kind of addition costs as much as all else.
        counts = tl.load(ints + row * INTS + NEEDED) > 0
        weighs = tl.load(ints + row * INTS + WEIGHS) > 0
        first = tl.program_id(1) * TILES_PER_PROGRAM
        for i in range(TILES_PER_PROGRAM):
            tile = first + i
            highest = tl.load(tile_max + row * tiles + tile, mask=tile < tiles, other=-float("inf"))
            if highest >= floor:
                z, _ = load_tile(logits, row, tile, width, row_stride, segment_stride, TILE)
                inside = z >= low
                bucket = row * BUCKETS + bucket_of(tl.where(inside, z, best), best, scale, BUCKETS)
                if counts:
                    tl.atomic_add(hist_count + bucket, 1, mask=inside, sem="relaxed")
                if weighs:
                    mass = tl.where(z > -float("inf"), logit_mass(z, best, inverse), 0)
                    tl.atomic_add(hist_mass + bucket, mass, mask=inside & (mass > 0), sem="relaxed")
                    rest = tl.sum(tl.where(inside, 0, mass), 0)
                    if rest > 0:
                        tl.atomic_add(longs + row * LONGS + MASS_REST, rest, sem="relaxed")


@triton.jit
def _first_reaching(weights, target, BUCKETS: tl.constexpr):
    """The first bucket up to which weights [BUCKETS] (int64) sum to target; BUCKETS if none."""
    bucket = tl.arange(0, BUCKETS)
    low = tl.full([], 0, tl.int32)
    high = tl.full([], BUCKETS, tl.int32)
    while low < high:
        middle = (low + high) // 2
        if tl.sum(tl.where(bucket <= middle, weights, 0), 0) >= target:
            high = middle
        else:
            low = middle + 1
    return low


@triton.jit
def share_of(total, p):
    """The mass that top-p asks for: ceil(p * total), at least 1; total: int64, p: float32."""
    exact = p.to(tl.float64) * total.to(tl.float64)
    whole = exact.to(tl.int64)
    return tl.maximum(whole + (whole.to(tl.float64) < exact).to(tl.int64), 1)


@triton.jit
def select(
    slots,
    top_ps,
    ints,
    longs,
    hist_count,
    hist_mass,
    which,
    BUCKETS: tl.constexpr,
    LISTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program a row.  A boundary outside the buckets makes the row EXHAUSTIVE.

    With top-k, the mass that top-p shares out is known up to that of BUCKET_K,
    so its boundary is in BUCKET_P_FIRST .. BUCKET_P_LAST.
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    if tl.load(ints + row * INTS + MODE) == WIDE:
        p = tl.load(top_ps + tl.load(slots + step_row(which, row, LISTED)))
        bucket = tl.arange(0, BUCKETS)
        counts = tl.load(hist_count + row * BUCKETS + bucket).to(tl.int64)
        masses = tl.load(hist_mass + row * BUCKETS + bucket)
        k = tl.load(ints + row * INTS + NEEDED)
        inside = tl.sum(masses, 0)
        # Without top-k: no bucket is its boundary's, and the mass is exact.
        bucket_k = tl.full([], BUCKETS, tl.int32)
        least = inside + tl.load(longs + row * LONGS + MASS_REST)
        most = least
        outside = False
        if k > 0:
            bucket_k = _first_reaching(counts, k.to(tl.int64), BUCKETS)
            outside = bucket_k == BUCKETS
            least = tl.sum(tl.where(bucket < bucket_k, masses, 0), 0)
            most = tl.sum(tl.where(bucket <= bucket_k, masses, 0), 0)
            above = tl.sum(tl.where(bucket < bucket_k, counts, 0), 0).to(tl.int32)
            tl.store(ints + row * INTS + NEEDED, k - above)
            tl.store(ints + row * INTS + ABOVE, above)
        first = _first_reaching(masses, share_of(least, p), BUCKETS)
        last = _first_reaching(masses, share_of(most, p), BUCKETS)
        if p < 1.0:
            outside = outside | (last == BUCKETS)
        else:
            first = tl.full([], BUCKETS, tl.int32)
            last = first
        before = tl.sum(tl.where(bucket < first, masses, 0), 0)
        tl.store(ints + row * INTS + BUCKET_K, bucket_k)
        tl.store(ints + row * INTS + BUCKET_P_FIRST, first)
        tl.store(ints + row * INTS + BUCKET_P_LAST, last)
        tl.store(longs + row * LONGS + MASS_ABOVE, least)
        tl.store(longs + row * LONGS + MASS_BEFORE, before)
        if outside:
            tl.store(ints + row * INTS + MODE, EXHAUSTIVE)
