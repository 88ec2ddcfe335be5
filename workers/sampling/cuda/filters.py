"""The threshold of a row: top-k, top-p and min-p keep the tokens with logits from it upwards.

`collect` gathers the tokens that may be a boundary, `finish` finds the
boundaries among them, exactly and without sorting (search.py).  Their order in
memory depends on timing; nothing that is computed from them does.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...kernels.cuda.overlap import come_up, wait
from .arithmetic import (
    LOWEST_FINITE,
    bucket_of,
    from_order,
    load_tile,
    logit_mass,
    not_below,
    order,
    step_row,
)
from .histogram import share_of
from .rows import (
    ABOVE,
    BEST,
    BUCKET_K,
    BUCKET_P_FIRST,
    BUCKET_P_LAST,
    COUNT,
    EXHAUSTIVE,
    FLOATS,
    INTS,
    LONGS,
    LOW,
    MASS_ABOVE,
    MASS_BEFORE,
    MODE,
    NARROW,
    NEEDED,
    OPEN,
    SCALE,
    THRESHOLD,
    WIDE,
)
from .search import kth_best, largest_reaching, row_largest_reaching, row_weight


@triton.jit
def collect(
    logits,
    tile_max,
    floats,
    ints,
    candidates,
    width,
    row_stride,
    segment_stride,
    tiles,
    TILE: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr,
    BUCKETS: tl.constexpr,
    ROOM: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """candidates [rows, ROOM] float32, in any order; COUNT of a row may exceed ROOM.

    Grid as scan's.
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    mode = tl.load(ints + row * INTS + MODE)
    if (mode == NARROW) | (mode == WIDE):
        best = tl.load(floats + row * FLOATS + BEST)
        low = tl.load(floats + row * FLOATS + LOW)
        scale = tl.load(floats + row * FLOATS + SCALE)
        bucket_k = tl.load(ints + row * INTS + BUCKET_K)
        bucket_first = tl.load(ints + row * INTS + BUCKET_P_FIRST)
        bucket_last = tl.load(ints + row * INTS + BUCKET_P_LAST)
        first = tl.program_id(1) * TILES_PER_PROGRAM
        for i in range(TILES_PER_PROGRAM):
            tile = first + i
            highest = tl.load(tile_max + row * tiles + tile, mask=tile < tiles, other=-float("inf"))
            if highest >= low:
                z, _ = load_tile(logits, row, tile, width, row_stride, segment_stride, TILE)
                bucket = bucket_of(tl.maximum(z, low), best, scale, BUCKETS)
                by_p = (bucket >= bucket_first) & (bucket <= bucket_last)
                chosen = (z >= low) & ((bucket == bucket_k) | by_p)
                found = tl.sum(chosen.to(tl.int32), 0)
                if found > 0:
                    start = tl.atomic_add(ints + row * INTS + COUNT, found, sem="relaxed")
                    place = start + tl.cumsum(chosen.to(tl.int32), 0) - 1
                    tl.store(candidates + row * ROOM + place, z, mask=chosen & (place < ROOM))


@triton.jit
def _among_candidates(
    candidates, count, best, inverse, p, needed, row, floats, ints, longs,
    BUCKETS: tl.constexpr, ROOM: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """The threshold (float32) by top-k and top-p from the row's candidates, at most MOST."""
    index = tl.arange(0, MOST)
    valid = index < count
    z = tl.load(candidates + row * ROOM + index, mask=valid, other=best)
    scale = tl.load(floats + row * FLOATS + SCALE)
    keys = order(z)
    threshold = tl.full([], LOWEST_FINITE, tl.float32)
    total = tl.load(longs + row * LONGS + MASS_ABOVE)
    masses = tl.where(valid, logit_mass(z, best, inverse), 0)
    if needed > 0:
        at_k = valid & (bucket_of(z, best, scale, BUCKETS) == tl.load(ints + row * INTS + BUCKET_K))
        threshold = kth_best(keys, at_k, needed)
        total += tl.sum(tl.where(at_k & (z >= threshold), masses, 0), 0)
    if p < 1.0:
        target = share_of(total, p) - tl.load(longs + row * LONGS + MASS_BEFORE)
        kept = tl.where(z >= threshold, masses, 0)
        threshold = tl.maximum(threshold, from_order(largest_reaching(keys, kept, target)))
    return threshold


@triton.jit
def _over_the_row(
    logits,
    row,
    best,
    inverse,
    p,
    needed,
    width,
    row_stride,
    segment_stride,
    segments,
    BLOCK: tl.constexpr,
):
    """The same from all tokens of the row, read again for every bit; for rows of many ties."""
    at_k = tl.full([], 0, tl.int64)
    if needed > 0:
        at_k = row_largest_reaching(
            logits, row, best, inverse, needed.to(tl.int64),
            width, row_stride, segment_stride, segments, False, BLOCK,
        )  # fmt: skip
    at_p = at_k
    if p < 1.0:
        total = row_weight(
            logits, row, best, inverse, at_k,
            width, row_stride, segment_stride, segments, True, BLOCK,
        )  # fmt: skip
        # More than top-k kept cannot be needed: the share is no larger than the total.
        at_p = row_largest_reaching(
            logits, row, best, inverse, share_of(total, p),
            width, row_stride, segment_stride, segments, True, BLOCK,
        )  # fmt: skip
    key = tl.maximum(at_k, at_p)
    return tl.where(key == 0, LOWEST_FINITE, from_order(key))


@triton.jit
def finish(
    logits,
    slots,
    temperatures,
    top_ps,
    min_ps,
    floats,
    ints,
    longs,
    candidates,
    which,
    width,
    row_stride,
    segment_stride,
    segments,
    BUCKETS: tl.constexpr,
    ROOM: tl.constexpr,
    FEW: tl.constexpr,
    BLOCK: tl.constexpr,
    LISTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """Writes THRESHOLD of every row.

    One program a row; BLOCK: tokens that a search of the whole row reads at once; FEW: as
    many candidates as most rows have at most.
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    slot = tl.load(slots + step_row(which, row, LISTED))
    temperature = tl.load(temperatures + slot).to(tl.float64)
    p = tl.load(top_ps + slot)
    min_p = tl.load(min_ps + slot)
    best = tl.load(floats + row * FLOATS + BEST)
    mode = tl.load(ints + row * INTS + MODE)
    threshold = tl.full([], LOWEST_FINITE, tl.float32)
    if mode != OPEN:
        inverse = 1.0 / temperature
        needed = tl.load(ints + row * INTS + NEEDED)
        count = tl.load(ints + row * INTS + COUNT)
        if (mode == EXHAUSTIVE) | (count > ROOM):
            above = tl.load(ints + row * INTS + ABOVE)
            threshold = _over_the_row(
                logits, row, best, inverse, p, needed + above,
                width, row_stride, segment_stride, segments, BLOCK,
            )  # fmt: skip
        else:
            if count <= FEW:
                threshold = _among_candidates(
                    candidates, count, best, inverse, p, needed, row, floats, ints, longs,
                    BUCKETS, ROOM, FEW,
                )  # fmt: skip
            else:
                threshold = _among_candidates(
                    candidates, count, best, inverse, p, needed, row, floats, ints, longs,
                    BUCKETS, ROOM, ROOM,
                )  # fmt: skip
    if (temperature > 0.0) & (min_p > 0.0):
        lowest = best.to(tl.float64) + temperature * tl.log(min_p.to(tl.float64))
        threshold = tl.maximum(threshold, not_below(lowest))
    tl.store(floats + row * FLOATS + THRESHOLD, threshold)
