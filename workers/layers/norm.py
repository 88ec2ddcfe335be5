"""Root-mean-square norm, fused with the addition to the residual stream before it."""

from __future__ import annotations

import torch

from .rank import Rank
from .weights import Weights


class RMSNorm:
    """[T, hidden] -> [T, hidden]; every rank has all of it."""

    def __init__(self, weights: Weights, eps: float, rank: Rank) -> None:
        self._kernels = rank.kernels
        self._weight = rank.keep(weights["weight"])
        self._eps = eps

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        """residual += x, in place; returns the norm of it."""
        return self._kernels.add_rms_norm(x, residual, self._weight, self._eps)
