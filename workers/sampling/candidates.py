"""Sampling of rows of which every rank has a shard, by exchanging little ("vocab" mode).

VocabSampler (vocab.py) calls the three kernels, with an exchange between each two:

    heads     every row: what the shard is (SOUND ...), its best logit and that one's token
    messages  a row by its kind, in the frame of the best logit of all shards:
              greedy: nothing.  plain: the shard's winner and its s + g.
              filtered: the shard's best logits, from which on they are all there, its mass
    decide    all rows, from all ranks' messages, the same on every rank

The kept set {z >= t} of a filtered row is known when t is not below any rank's
limit, from which on it has sent all of its logits: then boundary and draw are
those of the whole row, to the bit.  Else the row is UNDECIDED, and is sampled whole.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from ..machine_code import native
from ..parallel.slabs import ROW_MESSAGE_WORDS
from .draw import draw_token, gumbel, why_none
from .filters import (
    BLOCK,
    BROKEN,
    EMPTY,
    LOWEST_FINITE,
    NEGLIGIBLE,
    SOUND,
    first_best,
    gather,
    kth_best,
    reach,
    scan_row,
    token_mass,
)
from .philox import token_words

UNDECIDED = -2
"""In place of a token: the candidates do not prove the kept set."""

HEAD_WORDS = 4
STATE, BEST, BEST_TOKEN = 0, 1, 2
"""Of a head, int32; BEST is a float32."""

PLAIN_WORDS = 4
"""A plain row's message: float64 s + g, token, 0."""

FILTERED_HEAD = 6
"""A filtered row's message: float64 limit, int64 mass, count, 0; then logits, then tokens."""

MAX_CANDIDATES = (ROW_MESSAGE_WORDS - FILTERED_HEAD) // 2
_ROOM_FOR_TIES = 16

GREEDY, PLAIN, FILTERED = 0, 1, 2


@njit(nogil=True)
def row_kind(slot, temperature, top_k, top_p, min_p, vocab_size):  # type: ignore[no-untyped-def]
    """GREEDY, PLAIN or FILTERED."""
    if temperature[slot] <= 0.0:
        return GREEDY
    if 0 < top_k[slot] < vocab_size or top_p[slot] < 1.0 or min_p[slot] > 0.0:
        return FILTERED
    return PLAIN


@njit(nogil=True)
def room_of(top_k, vocab_size):  # type: ignore[no-untyped-def]
    """Candidates that a filtered row's message has room for, an even number."""
    if 0 < top_k < vocab_size and top_k + _ROOM_FOR_TIES < MAX_CANDIDATES:
        return (top_k + _ROOM_FOR_TIES + 1) // 2 * 2
    return MAX_CANDIDATES


@native()
def lay_out(slots, temperature, top_k, top_p, min_p, vocab_size, offsets):  # type: ignore[no-untyped-def]
    """offsets [R + 1] int64: where each row's message starts, in words, all of them even."""
    at = 0
    for i in range(len(slots)):
        offsets[i] = at
        kind = row_kind(slots[i], temperature, top_k, top_p, min_p, vocab_size)
        if kind == PLAIN:
            at += PLAIN_WORDS
        elif kind == FILTERED:
            at += FILTERED_HEAD + 2 * room_of(top_k[slots[i]], vocab_size)
    offsets[len(slots)] = at


@native()
def reduce_heads(logits, first, block_max, heads):  # type: ignore[no-untyped-def]
    """logits: [R, W] float32, the tokens from `first` on.  block_max: [R, ceil(W / BLOCK)].

    heads: [R, HEAD_WORDS] int32.
    """
    for i in range(len(logits)):
        state = scan_row(logits[i], block_max[i])
        heads[i, STATE] = state
        if state != BROKEN:
            best = first_best(logits[i], block_max[i])
            heads[i].view(np.float32)[BEST] = logits[i, best]
            heads[i, BEST_TOKEN] = first + best


@njit(nogil=True)
def _merge_heads(heads, row):  # type: ignore[no-untyped-def]
    """What the whole row is, its best logit (float64) and that one's lowest token."""
    state = EMPTY
    best = -np.inf
    token = -1
    for rank in range(len(heads)):
        head = heads[rank, row]
        if head[STATE] == BROKEN:
            return BROKEN, best, token
        if head[STATE] == SOUND:
            state = SOUND
            z = np.float64(head.view(np.float32)[BEST])
            if z > best:
                best = z
                token = head[BEST_TOKEN]
    return state, best, token


@native()
def write_messages(  # type: ignore[no-untyped-def]
    logits,
    first,
    vocab_size,
    slots,
    positions,
    params,
    block_max,
    heads,
    rank,
    offsets,
    message,
    scratch,
):
    """message: int32, offsets' words.  heads: all ranks', [size, R, HEAD_WORDS].

    params: (seed, temperature, top_k, top_p, min_p) by slot; scratch: Scratch.
    """
    seed, temperature, top_k, top_p, min_p = params
    for i in range(len(slots)):
        slot = slots[i]
        mine = message[offsets[i] : offsets[i + 1]]
        state, best, _ = _merge_heads(heads, i)
        kind = row_kind(slot, temperature, top_k, top_p, min_p, vocab_size)
        if kind == GREEDY or state != SOUND:
            continue
        if kind == PLAIN:
            mine.view(np.float64)[0] = -np.inf
            if heads[rank, i, STATE] == SOUND:
                winner, total = draw_token(
                    logits[i],
                    first,
                    block_max[i],
                    heads[rank, i, BEST_TOKEN] - first,
                    best,
                    LOWEST_FINITE,
                    np.float64(temperature[slot]),
                    seed[slot],
                    np.int64(positions[i]),
                    scratch.words,
                )
                mine.view(np.float64)[0] = total
                mine[2] = first + winner
        else:
            _write_candidates(
                logits[i],
                first,
                vocab_size,
                block_max[i],
                best,
                np.float64(temperature[slot]),
                top_k[slot],
                top_p[slot],
                min_p[slot],
                mine,
                scratch,
            )


@njit(nogil=True)
def _floor_of(best, temperature, top_p, min_p):  # type: ignore[no-untyped-def]
    """A logit below which nothing is kept or weighs anything."""
    if top_p < 1.0:
        return best + NEGLIGIBLE * temperature
    if min_p > 0.0:
        return best + temperature * math.log(np.float64(min_p))
    return LOWEST_FINITE


@njit(nogil=True)
def _write_candidates(  # type: ignore[no-untyped-def]
    row, first, vocab_size, block_max, best, temperature, top_k, top_p, min_p, mine, scratch
):
    values, weights, histogram = scratch.values, scratch.weights, scratch.histogram
    room = room_of(top_k, vocab_size)
    has_top_k = 0 < top_k < vocab_size
    floor = max(_floor_of(best, temperature, top_p, min_p), LOWEST_FINITE)
    mass = np.int64(0)
    if top_p < 1.0 and not has_top_k:
        count = gather(row, block_max, floor, values)
        inverse = 1.0 / temperature
        for i in range(count):
            mass += token_mass(max((values[i] - best) * inverse, NEGLIGIBLE))
    wanted = min(top_k, room) if has_top_k else room
    limit = floor
    if wanted < len(row):
        limit = max(limit, kth_best(row, block_max, wanted, values, weights, histogram))
    count = _list_candidates(row, first, block_max, limit, room, mine)
    if count > room:
        # Ties with the last: without them.
        limit = np.float64(np.nextafter(np.float32(limit), np.float32(np.inf)))
        count = _list_candidates(row, first, block_max, limit, room, mine)
    mine.view(np.float64)[0] = limit
    mine.view(np.int64)[1] = mass
    mine[4] = count


@njit(nogil=True)
def _list_candidates(row, first, block_max, limit, room, mine):  # type: ignore[no-untyped-def]
    """Logits and tokens with z >= limit; returns how many, or more than `room` if that many."""
    floats = mine.view(np.float32)
    count = 0
    for block in range(len(block_max)):
        if block_max[block] >= limit:
            for i in range(block * BLOCK, min((block + 1) * BLOCK, len(row))):
                if row[i] >= limit:
                    if count == room:
                        return room + 1
                    floats[FILTERED_HEAD + count] = row[i]
                    mine[FILTERED_HEAD + room + count] = first + i
                    count += 1
    return count


@native()
def decide(  # type: ignore[no-untyped-def]
    vocab_size, slots, positions, params, heads, offsets, messages, tokens, thresholds, scratch
):
    """tokens [R] int32: a token, why none, or UNDECIDED.  messages: all ranks', [size, words].

    thresholds [R] float64: t, where a filtered row is decided.
    """
    seed, temperature, top_k, top_p, min_p = params
    for i in range(len(slots)):
        slot = slots[i]
        state, best, best_token = _merge_heads(heads, i)
        kind = row_kind(slot, temperature, top_k, top_p, min_p, vocab_size)
        at = offsets[i]
        if state != SOUND:
            tokens[i] = why_none(state)
        elif kind == GREEDY:
            tokens[i] = best_token
        elif kind == PLAIN:
            tokens[i] = _best_winner(messages, at)
        else:
            heat = np.float64(temperature[slot])
            count, threshold = _merge_candidates(
                messages,
                at,
                room_of(top_k[slot], vocab_size),
                best,
                heat,
                top_k[slot],
                top_p[slot],
                min_p[slot],
                vocab_size,
                scratch,
            )
            tokens[i] = UNDECIDED
            if count > 0:
                thresholds[i] = threshold
                tokens[i] = _draw_candidate(
                    count, threshold, best, heat, seed[slot], np.int64(positions[i]), scratch
                )


@njit(nogil=True)
def _best_winner(messages, at):  # type: ignore[no-untyped-def]
    """The ranks have ascending tokens, so the first of equals is the lowest."""
    totals = messages.view(np.float64)
    winning = -np.inf
    winner = -1
    for rank in range(len(messages)):
        total = totals[rank, at // 2]
        if total > winning:
            winning = total
            winner = messages[rank, at + 2]
    return winner


@njit(nogil=True)
def _merge_candidates(  # type: ignore[no-untyped-def]
    messages, at, room, best, temperature, top_k, top_p, min_p, vocab_size, scratch
):
    """The candidates of all ranks into scratch.logits and .tokens; their number, and t.

    The number is 0 where they do not prove t.
    """
    floats = messages.view(np.float32)
    count = np.int64(0)
    limit = LOWEST_FINITE
    mass = np.int64(0)
    for rank in range(len(messages)):
        limit = max(limit, messages.view(np.float64)[rank, at // 2])
        mass += messages.view(np.int64)[rank, at // 2 + 1]
        first = at + FILTERED_HEAD
        for i in range(messages[rank, at + 4]):
            scratch.logits[count] = floats[rank, first + i]
            scratch.tokens[count] = messages[rank, first + room + i]
            count += 1
    floor = max(_floor_of(best, temperature, top_p, min_p), LOWEST_FINITE)
    known, threshold = _merged_threshold(
        count, limit, floor, mass, best, temperature, top_k, top_p, vocab_size, scratch
    )
    if min_p > 0.0:
        threshold = max(threshold, best + temperature * math.log(np.float64(min_p)))
    return (count if known and threshold >= limit else 0), threshold


@njit(nogil=True)
def _merged_threshold(  # type: ignore[no-untyped-def]
    count, limit, floor, mass, best, temperature, top_k, top_p, vocab_size, scratch
):
    """t of top-k and top-p, or -inf where all that is known of it is that it is below limit.

    And before it, whether that much is known.  The candidates are all logits >=
    limit.  mass: of the whole row, where top-k is off.
    """
    values, weights, histogram = scratch.values, scratch.weights, scratch.histogram
    threshold = floor
    has_top_k = 0 < top_k < vocab_size
    if has_top_k:
        if count >= top_k:
            for i in range(count):
                values[i] = scratch.logits[i]
                weights[i] = 1
            threshold = np.float64(reach(values, weights, count, np.int64(top_k), histogram))
        if threshold < limit:
            # Without all of what top-k keeps, top-p can cut anywhere.
            return top_p >= 1.0, -np.inf
    if top_p < 1.0:
        inverse = 1.0 / temperature
        inside = 0
        listed = np.int64(0)
        for i in range(count):
            z = scratch.logits[i]
            if z >= threshold and z >= limit:
                values[inside] = z
                weights[inside] = token_mass(max((z - best) * inverse, NEGLIGIBLE))
                listed += weights[inside]
                inside += 1
        total = listed if has_top_k else mass
        target = max(np.int64(math.ceil(np.float64(top_p) * total)), np.int64(1))
        if listed < target:
            return True, -np.inf
        threshold = max(threshold, np.float64(reach(values, weights, inside, target, histogram)))
    return True, threshold


@njit(nogil=True)
def _draw_candidate(count, threshold, best, temperature, seed, position, scratch):  # type: ignore[no-untyped-def]
    """As draw_token does of the whole row."""
    inverse = 1.0 / temperature
    words = scratch.words
    winning = -np.inf
    winner = -1
    for i in range(count):
        z = scratch.logits[i]
        if z >= threshold:
            token = scratch.tokens[i]
            token_words(seed, position, np.int64(token - token % 4), words[:4])
            total = (z - best) * inverse + gumbel(words[token % 4])
            if total > winning or (total == winning and token < winner):
                winning = total
                winner = token
    return winner
