"""The first look at the logits: one maximum a tile, from which all else starts.

In steps without filters the same look bounds each tile's best score (draw.py): the
random words are made while the logits come from memory.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...kernels.cuda.overlap import come_up, wait
from .arithmetic import (
    LOWEST_FINITE,
    best_of_tiles,
    bounded_inverse,
    every_fourth,
    is_filtered,
    max_or_nan,
    score_bounds,
    step_row,
)


@triton.jit
def scan(
    logits,
    tile_max,
    tile_score,
    slots,
    positions,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    which,
    first_id,
    width,
    row_stride,
    segment_stride,
    tiles,
    TILE: tl.constexpr,
    LINE: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr,
    SEGMENTED: tl.constexpr,
    GROUPED: tl.constexpr,
    DRAWS: tl.constexpr,
    MIXED: tl.constexpr,
    LISTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """tile_max [rows, tiles] float32: the best logit; +inf where a tile has NaN or +inf.

    DRAWS: tile_score [rows, tiles] float32 of rows that are not greedy, as `draw`
    writes it.  MIXED: but not of filtered ones.  SEGMENTED: rows have more than one piece.
    Grid (rows, ceil(tiles / TILES_PER_PROGRAM)).
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    first_tile = tl.program_id(1) * TILES_PER_PROGRAM
    # In lines, as best_of_tiles has them.
    line = tl.arange(0, TILES_PER_PROGRAM * TILE // LINE)
    tile = first_tile + line % TILES_PER_PROGRAM
    start = row.to(tl.int64) * row_stride
    begin = tile * TILE
    first_token = first_id
    if SEGMENTED:
        tiles_per_segment = tl.cdiv(width, TILE)
        segment = tile // tiles_per_segment
        begin = (tile % tiles_per_segment) * TILE
        start += segment.to(tl.int64) * segment_stride
        first_token += segment * width
    begin += line // TILES_PER_PROGRAM * LINE
    lane = begin[:, None] + tl.arange(0, LINE)[None, :]
    there = (tile < tiles)[:, None] & (lane < width)
    if LISTED:
        there &= tl.load(which + row) >= 0
    at = logits + (start[:, None] if SEGMENTED else start) + lane
    z0, z1, z2, z3 = every_fourth(tl.load(at, mask=there, other=-float("inf")).to(tl.float32))
    highest = max_or_nan(max_or_nan(z0, z1), max_or_nan(z2, z3))
    highest = tl.where(highest != highest, float("inf"), highest)
    best = best_of_tiles(highest, TILES_PER_PROGRAM)
    out = first_tile + tl.arange(0, TILES_PER_PROGRAM)
    tl.store(tile_max + row * tiles + out, best, mask=out < tiles)
    if DRAWS:
        at_row = step_row(which, row, LISTED)
        slot = tl.load(slots + at_row)
        temperature = tl.load(temperatures + slot)
        draws = temperature > 0.0
        if MIXED:
            draws &= is_filtered(slot, temperatures, top_ks, top_ps, min_ps) == 0
        if draws:
            frame = tl.gather(tl.maximum(best, LOWEST_FINITE), line % TILES_PER_PROGRAM, 0)
            score = score_bounds(
                z0, z1, z2, z3, first_token + begin, frame, bounded_inverse(temperature),
                tl.load(positions + at_row), tl.load(seeds + slot), TILES_PER_PROGRAM, GROUPED,
            )  # fmt: skip
            tl.store(tile_score + row * tiles + out, score, mask=out < tiles)
