"""Log-probabilities of tokens and of the best ones beside them, from the model's own logits.

The engine asks for the rows of requests that want them, with logits from before
their edits, and for the positions of prompts that a plan scores.  The ranks of
a group share out the rows.  A sum of exponentials is in fixed point, as the
filters' (filters.py): 152,000 tokens are off by 4e-8 at most, in any order.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from numba import njit

from ...ipc.plan import LOGPROB_WORDS, MAX_TOP_LOGPROBS
from ..machine_code import native
from .filters import BLOCK, MASS_BITS, NEGLIGIBLE, SOUND, scan_row, token_mass
from .shards import owned_rows

if TYPE_CHECKING:
    from ..parallel.communicator import HostCommunicator

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

_LOGPROB, _RANK, _IDS, _LOGPROBS = 2, 3, 4, 4 + MAX_TOP_LOGPROBS
_MINUS_INF = np.float32(-np.inf)


class Logprobs:
    """Of up to max_rows rows at a time, together with the group's other ranks."""

    def __init__(self, vocab_size: int, max_rows: int, communicator: HostCommunicator) -> None:
        size = communicator.size
        per_rank = -(-max_rows // size)
        self._communicator = communicator
        self._max_rows = max_rows
        self._logits = np.empty((per_rank if size > 1 else 0, vocab_size), np.float32)
        self._block_max = np.empty((2, -(-vocab_size // BLOCK)), np.float32)
        self._mine = np.zeros((per_rank, LOGPROB_WORDS), np.int32)

    def describe(self, logits: torch.Tensor, tokens: Int32Array, best: Int32Array) -> Int32Array:
        """[n, V / size] float32 of this rank's shard -> [n, LOGPROB_WORDS] int32 on every rank.

        tokens: [n], whose logprob and rank are told.  best: [n], how many of the
        best tokens.  The first two words, request and position, are the caller's.
        """
        count = len(tokens)
        records = np.empty((count, LOGPROB_WORDS), np.int32)
        for start in range(0, count, self._max_rows):
            end = min(start + self._max_rows, count)
            self._describe(
                logits[start:end], tokens[start:end], best[start:end], records[start:end]
            )
        return records

    def _describe(
        self, logits: torch.Tensor, tokens: Int32Array, best: Int32Array, records: Int32Array
    ) -> None:
        rank, size = self._communicator.rank, self._communicator.size
        shards = self._communicator.share_logits(logits.contiguous())
        per_rank = -(-len(tokens) // size)
        mine = self._mine[:per_rank]
        whole = owned_rows(shards, rank, self._logits)
        describe_rows(whole, rank, size, tokens, best, mine[: len(whole)], *self._block_max)
        gathered = self._communicator.all_gather_int32(mine.reshape(-1))
        for peer in range(size):
            theirs = records[peer::size]
            theirs[:] = gathered[peer].reshape(per_rank, LOGPROB_WORDS)[: len(theirs)]


@native()
def describe_rows(logits, first, stride, tokens, best, records, block_max, left):  # type: ignore[no-untyped-def]
    """Row i of logits [n, V] and of records is row first + i * stride of tokens and best.

    block_max, left: [ceil(V / BLOCK)] float32, scratch.
    """
    for i in range(len(records)):
        at = first + i * stride
        record = records[i]
        floats = record.view(np.float32)
        record[_RANK] = 1
        record[_IDS:_LOGPROBS] = -1
        floats[_LOGPROBS:] = _MINUS_INF
        if scan_row(logits[i], block_max) == SOUND:
            _describe_row(logits[i], tokens[at], best[at], record, floats, block_max, left)
        else:
            floats[_LOGPROB] = np.nan


@njit(nogil=True)
def _describe_row(row, token, best, record, floats, block_max, left):  # type: ignore[no-untyped-def]
    # Loops, not slices and methods of arrays: numba takes 4 s to compile those.
    highest = -np.inf
    for block in range(len(block_max)):
        left[block] = block_max[block]
        highest = max(highest, np.float64(block_max[block]))
    mass = np.int64(0)
    for i in range(len(row)):
        mass += token_mass(max(row[i] - highest, NEGLIGIBLE))
    normal = highest + math.log(np.float64(mass) * 2.0**-MASS_BITS)
    own = row[token]
    floats[_LOGPROB] = np.float32(own - normal)
    for block in range(len(block_max)):
        if block_max[block] > own:
            for i in range(block * BLOCK, min((block + 1) * BLOCK, len(row))):
                record[_RANK] += row[i] > own
    for place in range(min(best, MAX_TOP_LOGPROBS)):
        found = _next_best(row, left, place, record)
        if found < 0:
            break
        record[_IDS + place] = found
        floats[_LOGPROBS + place] = np.float32(row[found] - normal)


@njit(nogil=True)
def _next_best(row, left, place, record):  # type: ignore[no-untyped-def]
    """The best token after those in the record, the lower id of equals; -1: none has a finite one.

    left: the best logits of the blocks without these.
    """
    block = 0
    for i in range(1, len(left)):
        if left[i] > left[block]:
            block = i
    best = left[block]
    if best == _MINUS_INF:
        return -1
    found = -1
    rest = _MINUS_INF
    for i in range(block * BLOCK, min((block + 1) * BLOCK, len(row))):
        taken = False
        for j in range(place):
            taken |= record[_IDS + j] == i
        if not taken:
            if found < 0 and row[i] == best:
                found = i
            else:
                rest = max(rest, row[i])
    left[block] = rest
    return found
