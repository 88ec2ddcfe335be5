"""The gated MLP: down(silu(gate(x)) * up(x)), with gate and up as one GEMM."""

from __future__ import annotations

import torch

from .linear import ColumnParallelLinear, RowParallelLinear
from .rank import Rank
from .weights import Weights


class MLP:
    """[T, hidden] -> [T, hidden]."""

    def __init__(self, weights: Weights, rank: Rank) -> None:
        self._kernels = rank.kernels
        self._gate_up = ColumnParallelLinear(weights, ("gate_proj", "up_proj"), rank)
        self._down = RowParallelLinear(weights, "down_proj", rank)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(self._kernels.silu_mul(self._gate_up(x)))
