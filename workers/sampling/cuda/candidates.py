"""Filtered rows of which every rank has a shard: its best tokens are exchanged, not the row.

The GPU's form of sampling/candidates.py, in the order of a step, after draw.py's
exchange of the shards' best logits:

    outline    a logit from which on a shard has about as many tokens as may be wanted
    list_best  those tokens; and the shard's mass, where top-p alone needs it
    pack       the best MAX_CANDIDATES of them, and the limit from which on they are all
    (all_gather)
    decide_filtered  the rows' thresholds, and the draw

A threshold that is not below any rank's limit is that of the whole row, to the bit, as
the set {z >= threshold} is known.  Else the row is UNDECIDED, on all ranks alike, and
moving.py has it sampled whole.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...kernels.cuda.overlap import come_up, wait
from .arithmetic import (
    LOWEST_FINITE,
    NEGLIGIBLE,
    exact_gumbel,
    from_order,
    is_filtered,
    load_tile,
    logit_mass,
    not_below,
    order,
    token_word,
)
from .draw import best_winner
from .histogram import share_of
from .rows import COUNT, FLOATS, INTS, LOW, MODE, NARROW, OPEN
from .search import kth_best, largest_reaching

MAX_CANDIDATES = 256
"""Of a row, of one rank; as many as the CPU exchanges."""

HEAD_WORDS = 4
"""A row's message, int32: count, float32 limit, int64 mass; then logits, then tokens."""

MESSAGE_WORDS = -(-(HEAD_WORDS + 2 * MAX_CANDIDATES) // 16) * 16
"""Padded, so that ranks exchange a multiple of 16 words whatever the number of rows: Triton has a
kernel of its own for other lengths, and a step would wait for that."""

UNDECIDED = tl.constexpr(-2)
"""In place of a token: the candidates do not prove the kept set."""

_HEAD = tl.constexpr(HEAD_WORDS)
_MESSAGE = tl.constexpr(MESSAGE_WORDS)
_NO_ID = tl.constexpr(0x7FFFFFFF)


@triton.jit
def outline(
    tile_max, slots, temperatures, top_ks, top_ps, min_ps, floats, ints, masses,
    tiles, most, TILES: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a row: LOW, MODE (NARROW or OPEN), COUNT; masses [rows] int64 = 0.

    As many tiles reach LOW as tokens are wanted, top-k or `most`; where too few have a
    finite logit, all that are finite do.
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    slot = tl.load(slots + row)
    mode = tl.full([], OPEN, tl.int32)
    if is_filtered(slot, temperatures, top_ks, top_ps, min_ps):
        index = tl.arange(0, TILES)
        maxima = tl.load(tile_max + row * tiles + index, mask=index < tiles, other=-float("inf"))
        k = tl.load(top_ks + slot)
        wanted = tl.where(k > 0, tl.minimum(k, most), most)
        # Fewer tiles than that: kth_best is the lowest finite logit.
        tl.store(
            floats + row * FLOATS + LOW, kth_best(order(maxima), maxima > -float("inf"), wanted)
        )
        mode = tl.full([], NARROW, tl.int32)
    tl.store(ints + row * INTS + MODE, mode)
    tl.store(ints + row * INTS + COUNT, 0)
    tl.store(masses + row, tl.full([], 0, tl.int64))


@triton.jit(do_not_specialize=["rows"])
def list_best(
    logits, tile_max, slots, temperatures, top_ks, top_ps, winners, floats, ints, masses,
    listed_logits, listed_tokens, first_id, width, row_stride, tiles, rows, ranks, vocab,
    TILE: tl.constexpr, TILES_PER_PROGRAM: tl.constexpr, ROOM: tl.constexpr, RANKS: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """listed_logits, listed_tokens [rows, ROOM], in any order; COUNT of a row may exceed ROOM.

    winners: all ranks'.  Grid (rows, ceil(tiles / TILES_PER_PROGRAM)).
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    if tl.load(ints + row * INTS + MODE) == NARROW:
        slot = tl.load(slots + row)
        low = tl.load(floats + row * FLOATS + LOW)
        k = tl.load(top_ks + slot)
        floor = low
        weighs = (tl.load(top_ps + slot) < 1.0) & ((k <= 0) | (k >= vocab))
        best = low
        inverse = tl.full([], 0.0, tl.float64)
        if weighs:
            rank = tl.arange(0, RANKS)
            bests = tl.load(winners + (rank * rows + row) * 4, mask=rank < ranks, other=-8388608)
            best = tl.max(bests.to(tl.float32, bitcast=True), 0)
            temperature = tl.load(temperatures + slot)
            inverse = 1.0 / temperature.to(tl.float64)
            floor = tl.maximum(best + 1.0001 * NEGLIGIBLE * temperature, LOWEST_FINITE)
        mass = tl.full([], 0, tl.int64)
        for i in range(TILES_PER_PROGRAM):
            tile = tl.program_id(1) * TILES_PER_PROGRAM + i
            highest = tl.load(tile_max + row * tiles + tile, mask=tile < tiles, other=-float("inf"))
            if highest >= tl.minimum(low, floor):
                z, start = load_tile(logits, row, tile, width, row_stride, 0, TILE)
                if weighs & (highest >= floor):
                    each = logit_mass(z, best, inverse)
                    mass += tl.sum(tl.where(z > -float("inf"), each, 0), 0)
                chosen = z >= low
                found = tl.sum(chosen.to(tl.int32), 0)
                if found > 0:
                    place = tl.atomic_add(ints + row * INTS + COUNT, found, sem="relaxed")
                    place += tl.cumsum(chosen.to(tl.int32), 0) - 1
                    chosen &= place < ROOM
                    token = first_id + start + tl.arange(0, TILE)
                    tl.store(listed_logits + row * ROOM + place, z, mask=chosen)
                    tl.store(listed_tokens + row * ROOM + place, token, mask=chosen)
        if mass > 0:
            tl.atomic_add(masses + row, mass, sem="relaxed")


@triton.jit
def _pack_best(
    listed_logits, listed_tokens, message, row, count, low,
    ROOM: tl.constexpr, SHOWN: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """(how many of the row's first SHOWN listed tokens the message has, from which logit on)."""
    index = tl.arange(0, SHOWN)
    there = index < count
    z = tl.load(listed_logits + row * ROOM + index, mask=there, other=-float("inf"))
    token = tl.load(listed_tokens + row * ROOM + index, mask=there, other=0)
    limit = low
    if SHOWN > MOST:
        last = kth_best(order(z), there, MOST)
        above = tl.sum((there & (z >= last)).to(tl.int32), 0)
        # Ties with the last: without them.
        limit = tl.where(above > MOST, from_order(order(last) + 1), last)
    kept = there & (z >= limit)
    place = tl.cumsum(kept.to(tl.int32), 0) - 1
    tl.store(message + _HEAD + place, z.to(tl.int32, bitcast=True), mask=kept)
    tl.store(message + _HEAD + MOST + place, token, mask=kept)
    return tl.sum(kept.to(tl.int32), 0), limit


@triton.jit
def pack(
    listed_logits, listed_tokens, floats, ints, masses, messages, mass_words,
    ROOM: tl.constexpr, MOST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """One program a row: messages [rows, MESSAGE_WORDS] int32; mass_words: the same as int64."""
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    if tl.load(ints + row * INTS + MODE) == NARROW:
        count = tl.load(ints + row * INTS + COUNT)
        low = tl.load(floats + row * FLOATS + LOW)
        message = messages + row * _MESSAGE
        # More than there was room for: nothing is known of what is missing.
        kept = tl.full([], 0, tl.int32)
        limit = tl.full([], float("inf"), tl.float32)
        if count <= MOST:
            kept, limit = _pack_best(
                listed_logits, listed_tokens, message, row, count, low, ROOM, MOST, MOST
            )
        elif count <= ROOM:
            kept, limit = _pack_best(
                listed_logits, listed_tokens, message, row, count, low, ROOM, ROOM, MOST
            )
        tl.store(message, kept)
        tl.store(message + 1, limit.to(tl.int32, bitcast=True))
        tl.store(mass_words + row * (_MESSAGE // 2) + 1, tl.load(masses + row))


@triton.jit
def _merged_threshold(
    z, listed, limit, mass, best, temperature, k, p, min_p, vocab
):  # fmt: skip
    """(t, whether it is known or at least known to be below limit), as sampling/candidates.py.

    z: the candidates' logits, of which `listed` are there: among them all that are >= limit.
    """
    inverse = 1.0 / temperature
    threshold = tl.full([], LOWEST_FINITE, tl.float32)
    known = tl.full([], 1, tl.int1)
    has_top_k = (k > 0) & (k < vocab)
    keys = order(z)
    if has_top_k:
        threshold = kth_best(keys, listed, k)
        if threshold < limit:
            # Without all of what top-k keeps, top-p can cut anywhere.
            known = p >= 1.0
            threshold = tl.full([], -float("inf"), tl.float32)
    if (p < 1.0) & (threshold > -float("inf")):
        inside = listed & (z >= threshold) & (z >= limit)
        masses = tl.where(inside, logit_mass(z, best, inverse), 0)
        total = tl.sum(masses, 0)
        target = share_of(tl.where(has_top_k, total, mass), p)
        if total < target:
            threshold = tl.full([], -float("inf"), tl.float32)
        else:
            threshold = tl.maximum(threshold, from_order(largest_reaching(keys, masses, target)))
    if min_p > 0.0:
        lowest = best.to(tl.float64) + temperature * tl.log(min_p.to(tl.float64))
        threshold = tl.maximum(threshold, not_below(lowest))
    return threshold, known


@triton.jit(do_not_specialize=["rows"])
def decide_filtered(
    winners, messages, mass_words, slots, positions, temperatures, top_ks, top_ps, min_ps, seeds,
    out, rows, ranks, vocab, RANKS: tl.constexpr, MOST: tl.constexpr,
    OVERLAP: tl.constexpr,
):  # fmt: skip
    """out [rows] int32: a token, why none, or UNDECIDED.

    winners, messages: all ranks', [ranks, rows, ...].
    One program a row; RANKS: `ranks` rounded up to a power of two.
    """
    come_up(OVERLAP)
    wait(OVERLAP)
    row = tl.program_id(0)
    token, best = best_winner(
        winners, row, rows, ranks, slots, positions, temperatures, seeds, RANKS, False
    )
    slot = tl.load(slots + row)
    usable = (best > -float("inf")) & (best < float("inf"))
    if usable & is_filtered(slot, temperatures, top_ks, top_ps, min_ps):
        temperature = tl.load(temperatures + slot).to(tl.float64)
        rank = tl.arange(0, RANKS)
        heads = (rank * rows + row) * _MESSAGE
        limits = tl.load(messages + heads + 1, mask=rank < ranks, other=-8388608)
        limit = tl.maximum(tl.max(limits.to(tl.float32, bitcast=True), 0), LOWEST_FINITE)
        mass = tl.sum(tl.load(mass_words + heads // 2 + 1, mask=rank < ranks, other=0), 0)

        lane = tl.arange(0, RANKS * MOST)
        whose = lane // MOST
        message = messages + (whose * rows + row) * _MESSAGE
        there = whose < ranks
        there &= lane % MOST < tl.load(message, mask=there, other=0)
        at = message + _HEAD + lane % MOST
        z = tl.load(at, mask=there, other=-8388608).to(tl.float32, bitcast=True)
        threshold, known = _merged_threshold(
            z, there, limit, mass, best, temperature, tl.load(top_ks + slot),
            tl.load(top_ps + slot), tl.load(min_ps + slot), vocab,
        )  # fmt: skip
        token = tl.full([], UNDECIDED, tl.int32)
        if known & (threshold >= limit):
            ids = tl.load(at + MOST, mask=there, other=0)
            words = token_word(ids, tl.load(positions + row), tl.load(seeds + slot))
            scaled = (z.to(tl.float64) - best.to(tl.float64)) * (1.0 / temperature)
            kept = there & (z >= threshold)
            total = tl.where(kept, scaled + exact_gumbel(words), -float("inf"))
            token = tl.min(tl.where(total == tl.max(total, 0), ids, _NO_ID), 0)
    tl.store(out + row, token)
