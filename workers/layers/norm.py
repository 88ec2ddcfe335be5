"""Root-mean-square norm, fused with the addition to the residual stream before it.

What is added is a share of each rank (see linear.py): the sum over the ranks is made here.

Weights stay float32 whatever the model's dtype: Gemma's are a small number more
than 1, of which bfloat16 would keep little.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from .rank import Rank
from .weights import Weights


def norm_weight(weights: Weights, name: str, rank: Rank) -> torch.Tensor:
    """The float32 weight `name` on the kernels' device.  KeyError where there is none."""
    found = weights.find(name, torch.float32)
    if found is None:
        raise KeyError(name)
    return rank.keep(found)


class RMSNorm:
    """[T, hidden] -> [T, hidden]; every rank has all of it."""

    def __init__(self, weights: Weights, eps: float, rank: Rank) -> None:
        self._rank = rank
        self._weight = norm_weight(weights, "weight", rank)
        self._eps = eps
        self._reads: Callable[[int], torch.Tensor | None] = lambda rows: None

    def feeds(self, reads: Callable[[int], torch.Tensor | None]) -> None:
        """reads: of the layer behind this norm, see Kernels.reads."""
        self._reads = reads

    def add(
        self, x: torch.Tensor, residual: torch.Tensor, inner: RMSNorm | None = None
    ) -> torch.Tensor:
        """residual += x, or inner(x), in place; returns the norm of it.

        x: the sum of what the ranks give here, each its share; it is overwritten.
        """
        weight = None if inner is None else inner._weight
        ahead = self._reads(len(x))
        return self._rank.add_rms_norm(x, residual, self._weight, self._eps, weight, ahead)
