"""Sampling of a step's rows, shared out over the ranks of a group.

The engine calls Sampler.sample with this rank's vocabulary shard of the
logits.  Rank r then samples rows r, r + size, ... over the whole vocabulary,
which it gathers from all ranks' shards, and the tokens are gathered last.  A
draw depends on logits, parameters, seed and position alone (sampling/draw.py),
so neither the number of ranks nor the batch shows in the tokens.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from .draw import sample_rows
from .filters import BLOCK, BUCKETS
from .params import SampleRows, SlotParams

if TYPE_CHECKING:
    from ..parallel.communicator import HostCommunicator

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


class RowSampler:
    """The row kernel with its scratch memory, for one vocabulary size; not shared by threads."""

    def __init__(self, vocab_size: int) -> None:
        blocks = -(-vocab_size // BLOCK)
        self._scratch = (
            np.empty(blocks, np.float32),
            np.empty(BLOCK, np.uint32),
            np.empty(vocab_size, np.float32),
            np.empty(vocab_size, np.int64),
            np.empty(BUCKETS, np.int64),
        )

    def sample(
        self,
        logits: Float32Array,
        rows: SampleRows,
        params: SlotParams,
        first: int,
        stride: int,
        tokens: Int32Array,
    ) -> None:
        """tokens[i] (a token id, or draw.NOT_FINITE) = sample of row first + i * stride of `rows`.

        logits: [n, V] float32, C-contiguous, row i for tokens[i]; tokens: [n].
        """
        sample_rows(
            logits,
            first,
            stride,
            rows.slots,
            rows.positions,
            params.seed,
            params.temperature,
            params.top_k,
            params.top_p,
            params.min_p,
            tokens,
            *self._scratch,
        )


class Sampler:
    """Samples the rows of up to max_num_seqs slots together with the group's other ranks."""

    def __init__(self, vocab_size: int, max_num_seqs: int, communicator: HostCommunicator) -> None:
        size = communicator.size
        per_rank = -(-max_num_seqs // size)
        self._communicator = communicator
        self._row_sampler = RowSampler(vocab_size)
        self._shard = torch.empty(max_num_seqs, vocab_size // size)
        self._logits = np.empty((per_rank if size > 1 else 0, vocab_size), np.float32)
        self._mine = np.empty(per_rank, np.int32)
        self._tokens = np.empty(per_rank * size, np.int32)

    def sample(self, logits: torch.Tensor, rows: SampleRows, params: SlotParams) -> Int32Array:
        """[R, V / size] logits of this rank's shard -> [R] tokens, valid until the next call.

        A token is draw.NOT_FINITE where the row cannot be sampled.  Every rank
        calls with the same rows and gets the same tokens.
        """
        count = len(rows)
        if count == 0:
            return self._tokens[:0]
        rank, size = self._communicator.rank, self._communicator.size
        if logits.dtype != torch.float32 or not logits.is_contiguous():
            logits = self._shard[:count].copy_(logits)
        shards = self._communicator.share_logits(logits)
        per_rank = -(-count // size)
        mine = self._mine[:per_rank]
        drawn = len(range(rank, count, size))
        self._row_sampler.sample(
            self._whole_rows(shards, drawn), rows, params, rank, size, mine[:drawn]
        )
        if size == 1:
            return mine
        mine[drawn:] = 0
        tokens = self._tokens[: per_rank * size]
        tokens.reshape(per_rank, size)[:] = self._communicator.all_gather_int32(mine).T
        return tokens[:count]

    def _whole_rows(self, shards: list[Float32Array], drawn: int) -> Float32Array:
        """This rank's rows over the whole vocabulary, [drawn, V]."""
        if len(shards) == 1:
            return shards[0]
        rank, size = self._communicator.rank, self._communicator.size
        logits = self._logits[:drawn]
        first_token = 0
        for shard in shards:
            width = shard.shape[1]
            logits[:, first_token : first_token + width] = shard[rank::size]
            first_token += width
        return logits


def compile_all() -> None:
    """Compiles the kernels (or loads them from numba's cache), so that a fork inherits them."""
    vocab_size = 8 * BLOCK
    params = SlotParams.zeros(2)
    params.temperature[1] = 1.0
    params.top_k[1] = 4
    params.top_p[1] = 0.5
    params.min_p[1] = 0.1
    slots = np.arange(2, dtype=np.int32)
    rows = SampleRows(slots=slots, requests=slots, positions=slots)
    logits = np.zeros((2, vocab_size), np.float32)
    RowSampler(vocab_size).sample(logits, rows, params, 0, 1, np.empty(2, np.int32))
