"""The first look at the logits: one maximum a tile, from which all else starts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def scan(
    logits,
    tile_max,
    width,
    row_stride,
    segment_stride,
    tiles,
    TILE: tl.constexpr,
    TILES_PER_PROGRAM: tl.constexpr,
):
    """tile_max [rows, tiles] float32: the best logit; +inf where a tile has NaN or +inf.

    Grid (rows, ceil(tiles / TILES_PER_PROGRAM)).
    """
    row = tl.program_id(0)
    tile = tl.program_id(1) * TILES_PER_PROGRAM + tl.arange(0, TILES_PER_PROGRAM)
    tiles_per_segment = tl.cdiv(width, TILE)
    segment = tile // tiles_per_segment
    lane = ((tile % tiles_per_segment) * TILE)[:, None] + tl.arange(0, TILE)[None, :]
    start = row.to(tl.int64) * row_stride + segment.to(tl.int64) * segment_stride
    z = tl.load(
        logits + start[:, None] + lane,
        mask=(tile < tiles)[:, None] & (lane < width),
        other=-float("inf"),
    ).to(tl.float32)
    z = tl.where(z != z, float("inf"), z)
    tl.store(tile_max + row * tiles + tile, tl.max(z, 1), mask=tile < tiles)
