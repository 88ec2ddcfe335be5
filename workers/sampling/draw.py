"""The row kernel: a row of logits to a token, by Gumbel-max over what the filters keep.

Called by Sampler (sampling/sampler.py) once a step for all its rows.  The
token with the highest s + g wins, where s is its scaled logit (see
filters.py), g = -log(-log u) and u = (word + 0.5) / 2**32 with the Philox word
of (seed, position, token id).  Winning has the probability of the softmax over
the kept tokens, and depends on nothing but the row and these three; equal sums
go to the lower id.

Pruning is exact: g <= -log(1 - u) and g < MAX_GUMBEL, so most blocks of tokens
need no random word, and most tokens with one no logarithm, to be known losers.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from ...ipc.plan import ROW_NOT_FINITE, ROW_NOTHING_ALLOWED
from ..machine_code import native
from .filters import BLOCK, EMPTY, SOUND, first_best, keep_threshold, scan_row
from .philox import token_words

NOT_FINITE = -1 - ROW_NOT_FINITE
"""In place of a token: the row has a NaN or a +inf."""

NOTHING_ALLOWED = -1 - ROW_NOTHING_ALLOWED
"""The same: the row has nothing but -inf, which is what the request's own edits make of logits."""

MAX_GUMBEL = 22.9
"""Above -log(-log u) of the largest u, 1 - 2**-33."""

DRAW_WORDS = BLOCK + 4
"""Random words that a draw holds at once."""

_WORDS = 2.0**32
_SLACK = 1.0 + 1e-9


@njit(nogil=True, inline="always")
def why_none(state):  # type: ignore[no-untyped-def]
    """In place of the token of a row that is not SOUND."""
    return NOTHING_ALLOWED if state == EMPTY else NOT_FINITE


@njit(nogil=True, inline="always")
def gumbel(word):  # type: ignore[no-untyped-def]
    return -math.log(-math.log((np.float64(word) + 0.5) / _WORDS))


@njit(nogil=True)
def draw_token(  # type: ignore[no-untyped-def]
    row, first, block_max, start_at, best, threshold, temperature, seed, position, words
):
    """The index drawn from {z >= threshold} of row [W] float32, and its s + g (float64).

    The row is the vocabulary from token `first` on; best: the best logit (float64)
    of all of it.  start_at: index of the row's best logit, which may win whatever
    its logit is.  seed: uint64.  words: [DRAW_WORDS] uint32, scratch.
    """
    inverse = 1.0 / np.float64(temperature)
    # Random words come in fours, and so does the block's length.
    offset = first % 4
    count = BLOCK + 4 if offset else BLOCK
    token = first + start_at
    token_words(seed, position, token - token % 4, words[:4])
    winner = start_at
    winning = (row[start_at] - best) * inverse + gumbel(words[token % 4])
    for block in range(len(block_max)):
        highest = np.float64(block_max[block])
        lead = (highest - best) * inverse - winning
        if highest < threshold or lead + MAX_GUMBEL < 0.0:
            continue
        start = block * BLOCK
        token_words(seed, position, first + start - offset, words[:count])
        # A token of the block can win only with 1 - u < exp(lead); 1.5 covers the rounding here.
        needed = np.int64(max(_WORDS - 1.5 - math.exp(min(lead, 0.0)) * _WORDS * _SLACK, 0.0))
        for i in range(min(BLOCK, len(row) - start)):
            if words[offset + i] >= needed and row[start + i] >= threshold:
                total = (row[start + i] - best) * inverse + gumbel(words[offset + i])
                if total > winning or (total == winning and start + i < winner):
                    winning = total
                    winner = start + i
    return winner, winning


@native()
def sample_rows(  # type: ignore[no-untyped-def]
    logits,
    first,
    stride,
    slots,
    positions,
    seed,
    temperature,
    top_k,
    top_p,
    min_p,
    tokens,
    block_max,
    words,
    values,
    weights,
    histogram,
):
    """Samples rows first, first + stride, ... of a step: tokens[i] from logits[i] [V] float32.

    slots, positions: [R] int32, slot and draw position of every row of the
    step.  seed (uint64), temperature (float32), top_k (int32), top_p, min_p
    (float32): [slots].  tokens: [n] int32, a token id or why none.  The rest
    is scratch: block_max [ceil(V / BLOCK)] and values [V] float32, words
    [DRAW_WORDS] uint32, weights [V] and histogram [BUCKETS] int64.
    """
    for i in range(len(tokens)):
        row = logits[i]
        state = scan_row(row, block_max)
        if state != SOUND:
            tokens[i] = why_none(state)
            continue
        best_token = first_best(row, block_max)
        slot = slots[first + i * stride]
        if temperature[slot] <= 0.0:
            tokens[i] = best_token
            continue
        best = np.float64(row[best_token])
        threshold = keep_threshold(
            row,
            block_max,
            best,
            np.float64(temperature[slot]),
            top_k[slot],
            top_p[slot],
            min_p[slot],
            values,
            weights,
            histogram,
        )
        tokens[i], _ = draw_token(
            row,
            0,
            block_max,
            best_token,
            best,
            threshold,
            temperature[slot],
            seed[slot],
            np.int64(positions[first + i * stride]),
            words,
        )
