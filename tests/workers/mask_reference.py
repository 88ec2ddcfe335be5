"""Logits, masks, and what plain numpy makes of them: for the kernels of both devices."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

VOCAB, ROWS = 210, 5
INF = np.float32(np.inf)
SHARDS = [(0, 1), (1, 2), (2, 3)]
"""(rank, ranks)"""


class MaskCase(NamedTuple):
    """logits, expected: [ROWS, width] float32 of a shard from token `first` on.

    masks: [3, words] int32 of `rows`, of which those that hold are to be used.
    """

    logits: np.ndarray
    expected: np.ndarray
    rows: np.ndarray
    masks: np.ndarray
    holds: np.ndarray
    first: int


def mask_case(rank: int, ranks: int) -> MaskCase:
    """With NaN, +inf and -inf among the logits."""
    random = np.random.default_rng(rank)
    width = VOCAB // ranks
    first = rank * width
    logits = random.normal(size=(ROWS, width)).astype(np.float32)
    logits[:, 3], logits[:, 5], logits[:, 7] = np.nan, INF, -INF
    rows = np.array([3, 0, 4], np.int32)
    holds = np.array([True, True, False])
    masks = random.integers(-(2**31), 2**31, size=(3, -(-VOCAB // 32))).astype(np.int32)
    bits = np.ones((ROWS, VOCAB), bool)
    for row, held, words in zip(rows, holds, masks, strict=True):
        if held:
            bits[row] = np.unpackbits(words.view(np.uint8), bitorder="little")[:VOCAB]
    allowed = bits[:, first : first + width] | ~(logits < INF)
    return MaskCase(logits, np.where(allowed, logits, -INF), rows, masks, holds, first)
