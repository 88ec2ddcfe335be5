"""Whole rows of logits out of the shards of the vocabulary that the ranks of a group have."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32Array = npt.NDArray[np.float32]


def owned_rows(shards: list[Float32Array], rank: int, out: Float32Array) -> Float32Array:
    """Rows rank, rank + size, ... of the step over the whole vocabulary, [n, V].

    shards: by rank, [R, V / size].  out: [at least n, V], written and returned where
    there are several ranks.
    """
    return whole_rows(shards, slice(rank, None, len(shards)), out)


def whole_rows(shards: list[Float32Array], which: slice, out: Float32Array) -> Float32Array:
    """The same of the rows `which`."""
    if len(shards) == 1:
        return shards[0][which]
    first = 0
    rows = out[: len(shards[0][which])]
    for shard in shards:
        width = shard.shape[1]
        rows[:, first : first + width] = shard[which]
        first += width
    return rows
