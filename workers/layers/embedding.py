"""Token embeddings and the LM head, both split by the vocabulary.

Rank r of t has ids r * v/t .. (r+1) * v/t - 1.  The embedding is summed over
the ranks by the first norm; the logits stay apart: sampling puts them together, or does not.
"""

from __future__ import annotations

import torch

from .rank import Rank
from .weights import Weights


class VocabParallelEmbedding:
    """int32 token ids [T] -> [T, hidden], this rank's share of a sum.

    scale: of the rows. It is rounded to the table's dtype as the rows are, once, so
    a step costs nothing; the table is a copy, which a tied head does not see.
    """

    def __init__(self, weights: Weights, rank: Rank, scale: float = 1.0) -> None:
        self._kernels = rank.kernels
        self._table = rank.keep(rank.share(weights["weight"], 0))
        if scale != 1.0:
            self._table *= torch.tensor(scale, dtype=self._table.dtype)
        self._first_id = rank.index * len(self._table)

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        return self._kernels.embed(tokens, self._table, self._first_id)


class LMHead:
    """[R, hidden] -> this rank's logits, [R, vocab / size] float32.

    weights: of the embedding, where the model ties the two.
    """

    def __init__(self, weights: Weights, rank: Rank) -> None:
        self._kernels = rank.kernels
        self._packed = rank.kernels.pack_linear(
            rank.share(weights["weight"], 0), None, torch.float32
        )

    def reads(self, rows: int) -> torch.Tensor | None:
        """See Kernels.reads."""
        return self._kernels.reads(self._packed, rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear(x, self._packed)
