"""Sampling of a step's rows together with the other ranks of a group.

The engine calls Sampler.sample with this rank's vocabulary shard of the
logits.  There are three ways to the same tokens:

    gather     every rank gets all logits, and samples all rows
    sequence   every rank gets rows r, r + size, ... whole and samples those; then
               the tokens are gathered
    vocab      every rank reduces its shard of all rows to candidates, which are
               exchanged (vocab.py); rows they do not decide go the way of `sequence`

A draw depends on logits, parameters, seed and position alone (draw.py), so
neither the way nor the number of ranks nor the batch shows in the tokens.
`auto` takes the fastest by a table that rank 0 measures (tune), but lets `vocab` rest
for a while when it has left most rows of a step undecided: all ranks see that alike.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from .candidates import FILTERED, GREEDY, PLAIN, UNDECIDED
from .draw import DRAW_WORDS, sample_rows
from .filters import BLOCK, BUCKETS
from .params import SampleRows, SlotParams
from .shards import owned_rows, whole_rows
from .vocab import VocabSampler

if TYPE_CHECKING:
    from ..parallel.communicator import HostCommunicator

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

GATHER, SEQUENCE, VOCAB = MODES = ("gather", "sequence", "vocab")
AUTO = "auto"

_TUNED_ROWS = (1, 4, 16)
_TUNING_CALLS = 2
_REST_STEPS = 64
_MAX_NS = 2**31 - 1


class RowSampler:
    """The row kernel with its scratch memory, for one vocabulary size; not shared by threads."""

    def __init__(self, vocab_size: int) -> None:
        blocks = -(-vocab_size // BLOCK)
        self._scratch = (
            np.empty(blocks, np.float32),
            np.empty(DRAW_WORDS, np.uint32),
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
        """tokens[i] = sample of row first + i * stride of `rows`: a token, or why none (draw.py).

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
    """Samples the rows of up to max_num_seqs slots together with the group's other ranks.

    mode: one of MODES, or AUTO, which is `sequence` until tune() has measured.
    undecided: rows that the candidates of `vocab` have left to `sequence` so far.
    Raises ValueError for another mode.
    """

    def __init__(
        self,
        vocab_size: int,
        max_num_seqs: int,
        communicator: HostCommunicator,
        mode: str = SEQUENCE,
    ) -> None:
        if mode not in (*MODES, AUTO):
            raise ValueError(
                f"there is no sampling mode {mode!r}: choose one of {', '.join((*MODES, AUTO))}"
            )
        size = communicator.size
        self._per_rank = -(-max_num_seqs // size)
        self._communicator = communicator
        self._mode = mode
        self._vocab_size = vocab_size
        self._max_num_seqs = max_num_seqs
        self._row_sampler = RowSampler(vocab_size)
        self._shard = torch.empty(max_num_seqs, vocab_size // size)
        self._logits = np.empty((self._per_rank if size > 1 else 0, vocab_size), np.float32)
        self._mine = np.empty(self._per_rank, np.int32)
        self._tokens = np.empty(self._per_rank * size, np.int32)
        self._resting = 0
        self.undecided = 0
        self._table: dict[tuple[int, int], str] = {}
        if size > 1 and mode in (VOCAB, AUTO):
            self._vocab = VocabSampler(vocab_size // size, max_num_seqs, communicator)

    def sample(self, logits: torch.Tensor, rows: SampleRows, params: SlotParams) -> Int32Array:
        """[R, V / size] logits of this rank's shard -> [R] tokens, valid until the next call.

        A token is draw.NOT_FINITE or NOTHING_ALLOWED where the row cannot be sampled.  Every rank
        calls with the same rows and gets the same tokens.
        """
        count = len(rows)
        tokens = self._tokens[:count]
        if count == 0:
            return tokens
        if logits.dtype != torch.float32 or not logits.is_contiguous():
            logits = self._shard[:count].copy_(logits)
        if self._communicator.size == 1:
            self._row_sampler.sample(logits.numpy(), rows, params, 0, 1, tokens)
        else:
            mode = self.mode_for(rows, params)
            self._resting = max(self._resting - 1, 0)
            self._sample_by(mode, logits, rows, params, tokens)
        return tokens

    def mode_for(self, rows: SampleRows, params: SlotParams) -> str:
        """How these rows are sampled; the same on all ranks."""
        if self._mode != AUTO or not self._table:
            return SEQUENCE if self._mode == AUTO else self._mode
        slots = rows.slots
        kind = GREEDY
        if (params.temperature[slots] > 0.0).any():
            filtered = (
                (params.top_k[slots] > 0) | (params.top_p[slots] < 1.0) | (params.min_p[slots] > 0)
            )
            kind = FILTERED if filtered.any() else PLAIN
        if kind == FILTERED and self._resting:
            return SEQUENCE
        size = min(_TUNED_ROWS, key=lambda tuned: abs(tuned.bit_length() - len(rows).bit_length()))
        return self._table.get((kind, size), SEQUENCE)

    def tune(self) -> None:
        """Measures the modes for AUTO, with made-up logits; all ranks call it together.

        Rank 0's times decide on every rank.
        """
        if self._communicator.size == 1 or self._mode != AUTO:
            return
        cases = [
            (kind, count)
            for kind in (GREEDY, PLAIN, FILTERED)
            for count in _TUNED_ROWS
            if count <= self._max_num_seqs
        ]
        times = [self._measure_ns(kind, count, mode) for kind, count in cases for mode in MODES]
        first = self._communicator.all_gather_int32(np.array(times, np.int32))[0]
        best = first.reshape(len(cases), len(MODES)).argmin(axis=1)
        self._table = {case: MODES[mode] for case, mode in zip(cases, best.tolist(), strict=True)}
        self._resting = self.undecided = 0

    def _measure_ns(self, kind: int, count: int, mode: str) -> int:
        """The fastest of a few calls."""
        params = _params_of_kind(kind, self._max_num_seqs)
        numbers = np.arange(count, dtype=np.int32)
        rows = SampleRows(slots=numbers, requests=numbers, positions=numbers)
        generator = torch.Generator().manual_seed(1 + self._communicator.rank)
        logits = torch.randn(count, self._shard.shape[1], generator=generator) * 2.5
        times = []
        for _ in range(_TUNING_CALLS):
            begun = time.perf_counter_ns()
            self._sample_by(mode, logits, rows, params, self._tokens[:count])
            times.append(time.perf_counter_ns() - begun)
        return min(*times, _MAX_NS)

    def _sample_by(
        self,
        mode: str,
        logits: torch.Tensor,
        rows: SampleRows,
        params: SlotParams,
        tokens: Int32Array,
    ) -> None:
        if mode == GATHER:
            self._gather(logits, rows, params, tokens)
        elif mode == SEQUENCE:
            self._sequence(logits, rows, params, tokens)
        else:
            self._vocab.sample(logits.numpy(), rows, params, tokens)
            left = np.flatnonzero(tokens == UNDECIDED)
            if len(left):
                self.undecided += len(left)
                if 2 * len(left) > len(rows):
                    self._resting = _REST_STEPS
                whole = np.empty(len(left), np.int32)
                self._sequence(logits[torch.from_numpy(left)], rows.only(left), params, whole)
                tokens[left] = whole

    def _gather(
        self, logits: torch.Tensor, rows: SampleRows, params: SlotParams, tokens: Int32Array
    ) -> None:
        shards = self._communicator.share_logits(logits)
        for start in range(0, len(rows), self._per_rank):
            end = min(start + self._per_rank, len(rows))
            whole = whole_rows(shards, slice(start, end), self._logits)
            self._row_sampler.sample(whole, rows, params, start, 1, tokens[start:end])

    def _sequence(
        self, logits: torch.Tensor, rows: SampleRows, params: SlotParams, tokens: Int32Array
    ) -> None:
        rank, size = self._communicator.rank, self._communicator.size
        shards = self._communicator.share_logits(logits)
        mine = self._mine[: -(-len(rows) // size)]
        whole = owned_rows(shards, rank, self._logits)
        self._row_sampler.sample(whole, rows, params, rank, size, mine[: len(whole)])
        mine[len(whole) :] = 0
        tokens[:] = self._communicator.all_gather_int32(mine).T.reshape(-1)[: len(rows)]


def _params_of_kind(kind: int, max_num_seqs: int) -> SlotParams:
    """GREEDY, PLAIN or FILTERED in every slot."""
    params = SlotParams.zeros(max_num_seqs)
    if kind != GREEDY:
        params.temperature[:] = 0.8
    if kind == FILTERED:
        params.top_k[:] = 50
        params.top_p[:] = 0.95
        params.min_p[:] = 0.02
    return params
