"""The draw: the kept token with the highest s + g, and from ranks' winners the token.

s = (z - best) / temperature, g = -log(-log u); see sampling/draw.py.  A tile's score is
a bound in float32, in the frame of the tile's own best logit: no token of the tile has
(z - tile's best) / temperature + g above it by MARGIN or more.  `scan` makes it for
whole rows, `draw` for what filters keep.  `winner` computes tiles again, in float64,
from the highest bound down to where none can win any more, and decides: one or two a row.

A rank's winner is four int32: the bits of its best logit, the bits of the
winner's logit, the winner's id, 0.  That is all a rank needs to know of
another: `decide` computes the scores again from the best of the best.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ....ipc.plan import ROW_NOT_FINITE, ROW_NOTHING_ALLOWED
from ...kernels.cuda.overlap import come_up, wait
from .arithmetic import (
    LOWEST_FINITE,
    bounded_inverse,
    every_fourth,
    exact_gumbel,
    is_filtered,
    load_tile,
    score_bounds,
    step_row,
    tile_words,
    token_word,
)
from .rows import BEST, FLOATS, THRESHOLD

_NOT_FINITE = tl.constexpr(-1 - ROW_NOT_FINITE)
_NOTHING_ALLOWED = tl.constexpr(-1 - ROW_NOTHING_ALLOWED)

MARGIN = tl.constexpr(2e-4)
"""A tile's best token has |s| <= 26.2 with three roundings, 5e-6; noise 1e-5.  Ten times that."""

LOSING = tl.constexpr(-26.2)
"""With s below it a token loses to the best one: noise is between -3.2 and 22.9."""

_NO_ID = tl.constexpr(0x7FFFFFFF)
WINNER_WORDS = 4


@triton.jit
def _why_none(best):
    """In place of the token of a row whose best logit is not finite."""
    nothing = tl.full([], _NOTHING_ALLOWED, tl.int32)
    return tl.where(best == -float("inf"), nothing, tl.full([], _NOT_FINITE, tl.int32))


@triton.jit
def draw(
    logits,
    tile_max,
    tile_score,
    floats,
    slots,
    positions,
    temperatures,
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
    GROUPED: tl.constexpr,
    LISTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """tile_score [rows, tiles] of what is kept; -inf where no token can win.  Grid as scan's."""
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    at = step_row(which, row, LISTED)
    slot = tl.load(slots + at)
    temperature = tl.load(temperatures + slot)
    best = tl.load(floats + row * FLOATS + BEST)
    if (temperature > 0.0) & (best > -float("inf")):
        threshold = tl.load(floats + row * FLOATS + THRESHOLD)
        inverse = bounded_inverse(temperature)
        position = tl.load(positions + at)
        seed = tl.load(seeds + slot)
        first = tl.program_id(1) * TILES_PER_PROGRAM
        for i in range(TILES_PER_PROGRAM):
            tile = first + i
            highest = tl.load(tile_max + row * tiles + tile, mask=tile < tiles, other=-float("inf"))
            score = tl.full([1], -float("inf"), tl.float32)
            near = (highest == best) | ((highest - best) * inverse > LOSING)
            if near & (highest >= threshold):
                z, token = load_tile(logits, row, tile, width, row_stride, segment_stride, TILE)
                kept = tl.where(z >= threshold, z, -float("inf"))
                z0, z1, z2, z3 = every_fourth(tl.reshape(kept, [TILE // LINE, LINE]))
                line = first_id + token + tl.arange(0, TILE // LINE) * LINE
                frame = tl.full([TILE // LINE], 0.0, tl.float32) + highest
                score = score_bounds(
                    z0, z1, z2, z3, line, frame, inverse, position, seed, 1, GROUPED
                )  # fmt: skip
            place = tile_score + row * tiles + tile + tl.arange(0, 1)
            tl.store(place, score, mask=tile < tiles)


@triton.jit
def _first_best(logits, row, maxima, best, width, row_stride, segment_stride, TILE: tl.constexpr):
    """The first token of a row, counted from its first, that has the best logit."""
    tile = tl.argmax((maxima == best).to(tl.int32), 0)
    z, token = load_tile(logits, row, tile, width, row_stride, segment_stride, TILE)
    return token + tl.argmax((z == best).to(tl.int32), 0)


@triton.jit
def winner(
    logits,
    tile_max,
    tile_score,
    floats,
    slots,
    positions,
    temperatures,
    top_ks,
    top_ps,
    min_ps,
    seeds,
    out,
    which,
    first_id,
    width,
    row_stride,
    segment_stride,
    tiles,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    GROUPED: tl.constexpr,
    GREEDY: tl.constexpr,
    FILTERED: tl.constexpr,
    MIXED: tl.constexpr,
    WHOLE: tl.constexpr,
    LISTED: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """One program a row.  WHOLE: out [rows] int32, a token or why none; else [rows, 4], the winner.

    MIXED: of filtered rows only the best logit.
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    at = step_row(which, row, LISTED)
    index = tl.arange(0, TILES)
    maxima = tl.load(tile_max + row * tiles + index, mask=index < tiles, other=-float("inf"))
    best = tl.max(maxima, 0)
    usable = (best > -float("inf")) & (best < float("inf"))
    token = _why_none(best)
    logit = best
    wanted = usable
    if MIXED:
        skipped = is_filtered(tl.load(slots + at), temperatures, top_ks, top_ps, min_ps)
        wanted = usable & (skipped == 0)
    if wanted:
        temperature = tl.full([], 0.0, tl.float32)
        if not GREEDY:
            temperature = tl.load(temperatures + tl.load(slots + at))
        if temperature > 0.0:
            slot = tl.load(slots + at)
            inverse = 1.0 / temperature.to(tl.float64)
            position = tl.load(positions + at)
            seed = tl.load(seeds + slot)
            threshold = tl.full([], LOWEST_FINITE, tl.float32)
            if FILTERED:
                threshold = tl.load(floats + row * FLOATS + THRESHOLD)
            scores = tl.load(
                tile_score + row * tiles + index, mask=index < tiles, other=-float("inf")
            )
            bounds = (maxima.to(tl.float64) - best.to(tl.float64)) * inverse + scores
            bounds = tl.where(scores > -float("inf"), bounds, -float("inf"))
            leading = tl.max(bounds, 0)
            # The tile of the best logit is far above this, and has been seen when the loop ends.
            winning = tl.full([], -1e30, tl.float64)
            while leading + MARGIN >= winning:
                tile = tl.argmax(bounds, 0)
                z, start = load_tile(logits, row, tile, width, row_stride, segment_stride, TILE)
                words = tile_words(first_id + start, position, seed, TILE, GROUPED)
                scaled = (z.to(tl.float64) - best.to(tl.float64)) * inverse
                total = tl.where(z >= threshold, scaled + exact_gumbel(words), -float("inf"))
                highest = tl.max(total, 0)
                lane = tl.argmax((total == highest).to(tl.int32), 0)
                better = (highest > winning) | ((highest == winning) & (start + lane < token))
                here = tl.max(tl.where(tl.arange(0, TILE) == lane, z, -float("inf")), 0)
                logit = tl.where(better, here, logit)
                token = tl.where(better, start + lane, token)
                winning = tl.where(better, highest, winning)
                bounds = tl.where(index == tile, -float("inf"), bounds)
                leading = tl.max(bounds, 0)
        else:
            token = _first_best(
                logits, row, maxima, best, width, row_stride, segment_stride, TILE
            ).to(tl.int32)
        token += first_id
    if WHOLE:
        tl.store(out + row, token)
    else:
        tl.store(out + row * 4, best.to(tl.int32, bitcast=True))
        tl.store(out + row * 4 + 1, logit.to(tl.int32, bitcast=True))
        tl.store(out + row * 4 + 2, token)


@triton.jit
def best_winner(
    winners, row, rows, ranks, slots, positions, temperatures, seeds,
    RANKS: tl.constexpr, GREEDY: tl.constexpr,
):  # fmt: skip
    """(token of a row from winners [ranks, rows, 4], or why none; the best logit of all ranks)."""
    rank = tl.arange(0, RANKS)
    there = rank < ranks
    words = winners + (rank * rows + row) * 4
    bests = tl.load(words, mask=there, other=-8388608).to(tl.float32, bitcast=True)
    logits = tl.load(words + 1, mask=there, other=-8388608).to(tl.float32, bitcast=True)
    ids = tl.load(words + 2, mask=there, other=-1)
    best = tl.max(bests, 0)
    token = _why_none(best)
    if (best > -float("inf")) & (best < float("inf")):
        temperature = tl.full([], 0.0, tl.float32)
        if not GREEDY:
            temperature = tl.load(temperatures + tl.load(slots + row))
        if temperature > 0.0:
            words_of = token_word(
                tl.maximum(ids, 0), tl.load(positions + row), tl.load(seeds + tl.load(slots + row))
            )
            inverse = 1.0 / temperature.to(tl.float64)
            scaled = (logits.to(tl.float64) - best.to(tl.float64)) * inverse
            total = tl.where(ids >= 0, scaled + exact_gumbel(words_of), -float("inf"))
            token = tl.min(tl.where(total == tl.max(total, 0), ids, _NO_ID), 0)
        else:
            token = tl.min(tl.where((bests == best) & (ids >= 0), ids, _NO_ID), 0)
    return token, best


@triton.jit(do_not_specialize=["rows"])
def decide(
    winners,
    slots,
    positions,
    temperatures,
    seeds,
    out,
    rows,
    ranks,
    RANKS: tl.constexpr,
    GREEDY: tl.constexpr,
    OVERLAP: tl.constexpr,
):
    """out [rows] int32 from winners [ranks, rows, 4] int32, in the order of the ranks.

    One program a row; RANKS: `ranks` rounded up to a power of two.
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    token, _ = best_winner(
        winners, row, rows, ranks, slots, positions, temperatures, seeds, RANKS, GREEDY
    )
    tl.store(out + row, token)
