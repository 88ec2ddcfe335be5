"""The "vocab" mode: every rank reduces its shard of each row to candidates, and only those move.

Two exchanges: of the best logits, in whose frame everything else is computed,
and of the candidates (candidates.py).  Which rows they do not decide is known
to all ranks alike; sampler.py samples those whole.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from .candidates import (
    HEAD_WORDS,
    MAX_CANDIDATES,
    decide,
    lay_out,
    reduce_heads,
    write_messages,
)
from .draw import DRAW_WORDS
from .filters import BLOCK, BUCKETS
from .params import SampleRows, SlotParams

if TYPE_CHECKING:
    from ..parallel.communicator import HostCommunicator

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


class Scratch(NamedTuple):
    """Memory of the kernels of candidates.py."""

    words: npt.NDArray[np.uint32]
    values: Float32Array
    weights: npt.NDArray[np.int64]
    histogram: npt.NDArray[np.int64]
    logits: Float32Array
    tokens: Int32Array


class VocabSampler:
    """Of up to max_num_seqs rows; this rank has the `width` tokens from rank * width on.

    thresholds: [max_num_seqs] float64, by row of the last step; see candidates.decide.
    """

    def __init__(self, width: int, max_num_seqs: int, communicator: HostCommunicator) -> None:
        size = communicator.size
        candidates = size * MAX_CANDIDATES
        most = max(width, candidates)
        self._communicator = communicator
        self._width = width
        self._block_max = np.empty((max_num_seqs, -(-width // BLOCK)), np.float32)
        self._heads = np.zeros((max_num_seqs, HEAD_WORDS), np.int32)
        self._offsets = np.zeros(max_num_seqs + 1, np.int64)
        self._message = np.zeros(0, np.int32)
        self.thresholds = np.zeros(max_num_seqs)
        self._scratch = Scratch(
            np.empty(DRAW_WORDS, np.uint32),
            np.empty(most, np.float32),
            np.empty(most, np.int64),
            np.empty(BUCKETS, np.int64),
            np.empty(candidates, np.float32),
            np.empty(candidates, np.int32),
        )

    def sample(
        self, logits: Float32Array, rows: SampleRows, params: SlotParams, tokens: Int32Array
    ) -> None:
        """[R, width] logits of this shard, C-contiguous -> tokens [R]: see candidates.decide."""
        count = len(rows)
        rank, size = self._communicator.rank, self._communicator.size
        first, vocab_size = rank * self._width, size * self._width
        filters = (params.temperature, params.top_k, params.top_p, params.min_p)
        values = (params.seed, *filters)
        heads, offsets = self._heads[:count], self._offsets[: count + 1]
        reduce_heads(logits, first, self._block_max, heads)
        lay_out(rows.slots, *filters, vocab_size, offsets)
        everyone = self._communicator.all_gather_int32(heads.reshape(-1))
        everyone = everyone.reshape(size, count, HEAD_WORDS)
        message = self._room_for(int(offsets[count]))
        write_messages(
            logits, first, vocab_size, rows.slots, rows.positions, values, self._block_max,
            everyone, rank, offsets, message, self._scratch,
        )  # fmt: skip
        # All ranks know how long it is: where nothing is to be told, nobody asks.
        messages = self._communicator.all_gather_int32(message) if len(message) else message
        decide(
            vocab_size, rows.slots, rows.positions, values, everyone, offsets,
            messages.reshape(size, -1), tokens, self.thresholds, self._scratch,
        )  # fmt: skip

    def _room_for(self, words: int) -> Int32Array:
        """Grows to the largest step there was."""
        if len(self._message) < words:
            self._message = np.zeros(words, np.int32)
        return self._message[:words]
