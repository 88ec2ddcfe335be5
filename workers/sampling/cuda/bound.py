"""Where the filters' boundaries can lie, from the maxima of the tiles alone.

top-k: k tiles reach the k-th best of the maxima, so the k-th best logit is no
lower; there are hardly more candidates than that (NARROW).
top-p: V tokens of mass below (1 - p) / V of the best one's cannot make the
boundary; what is above goes through a histogram (WIDE).
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...kernels.cuda.overlap import come_up, wait
from .arithmetic import LOWEST_FINITE, NEGLIGIBLE, order, step_row
from .rows import (
    ABOVE,
    BEST,
    BUCKET_K,
    BUCKET_P_FIRST,
    BUCKET_P_LAST,
    COUNT,
    FLOATS,
    FLOOR,
    INTS,
    LONGS,
    LOW,
    MASS_ABOVE,
    MASS_BEFORE,
    MASS_REST,
    MODE,
    NARROW,
    NEEDED,
    OPEN,
    SCALE,
    THRESHOLD,
    WEIGHS,
    WIDE,
)
from .search import kth_best

_SPANS = tl.constexpr(4.0)
"""How far the buckets reach, in distances of the lowest tile maximum from the best."""


@triton.jit
def bound(
    tile_max,
    slots,
    temperatures,
    top_ks,
    top_ps,
    floats,
    ints,
    longs,
    hist_count,
    hist_mass,
    which,
    vocab,
    tiles,
    TILES: tl.constexpr,
    BUCKETS: tl.constexpr,
    LISTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program a row; TILES: `tiles` rounded up to a power of two."""
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    slot = tl.load(slots + step_row(which, row, LISTED))
    temperature = tl.load(temperatures + slot)
    k = tl.load(top_ks + slot)
    p = tl.load(top_ps + slot)
    index = tl.arange(0, TILES)
    maxima = tl.load(tile_max + row * tiles + index, mask=index < tiles, other=-float("inf"))
    best = tl.max(maxima, 0)
    usable = (best > -float("inf")) & (best < float("inf")) & (temperature > 0.0)
    by_k = (k > 0) & (k < vocab)
    mode = tl.where(usable & (by_k | (p < 1.0)), WIDE, OPEN)
    low = best
    scale = 0.0
    floor = best
    if mode == WIDE:
        finite = maxima > -float("inf")
        if by_k & (k <= tl.sum(finite.to(tl.int32), 0)):
            mode = tl.full([], NARROW, tl.int32)
            low = kth_best(order(maxima), finite, k)
            floor = low
        else:
            lowest = tl.min(tl.where(finite, maxima, best), 0)
            span = (best - lowest) * _SPANS
            if by_k:
                low = tl.maximum(best - span, LOWEST_FINITE)
                floor = low
            else:
                doubtful = (vocab * 1.0) / (1.0 - p.to(tl.float64)).to(tl.float32)
                nats = tl.minimum(tl.log(doubtful) + 1.0, -NEGLIGIBLE)
                span = tl.minimum(span, nats * temperature)
                low = tl.maximum(best - span, LOWEST_FINITE)
                floor = tl.maximum(best + 1.0001 * NEGLIGIBLE * temperature, LOWEST_FINITE)
            scale = tl.where(span > 1e-30, BUCKETS / tl.maximum(span, 1e-30), 0.0)
            bucket = tl.arange(0, BUCKETS)
            tl.store(hist_count + row * BUCKETS + bucket, tl.zeros([BUCKETS], tl.int32))
            tl.store(hist_mass + row * BUCKETS + bucket, tl.zeros([BUCKETS], tl.int64))
    tl.store(floats + row * FLOATS + BEST, best)
    tl.store(floats + row * FLOATS + LOW, low)
    tl.store(floats + row * FLOATS + SCALE, scale)
    tl.store(floats + row * FLOATS + FLOOR, floor)
    tl.store(floats + row * FLOATS + THRESHOLD, LOWEST_FINITE)
    tl.store(ints + row * INTS + MODE, mode)
    tl.store(ints + row * INTS + COUNT, 0)
    tl.store(ints + row * INTS + NEEDED, tl.where(by_k, k, 0))
    tl.store(ints + row * INTS + ABOVE, 0)
    tl.store(ints + row * INTS + WEIGHS, (p < 1.0).to(tl.int32))
    tl.store(ints + row * INTS + BUCKET_K, 0)
    tl.store(ints + row * INTS + BUCKET_P_FIRST, 0)
    tl.store(ints + row * INTS + BUCKET_P_LAST, 0)
    tl.store(longs + row * LONGS + MASS_ABOVE, tl.full([], 0, tl.int64))
    tl.store(longs + row * LONGS + MASS_BEFORE, tl.full([], 0, tl.int64))
    tl.store(longs + row * LONGS + MASS_REST, tl.full([], 0, tl.int64))
