"""The gated MLP: down(f(gate(x)) * up(x)), f being SiLU or GELU, with gate and up as one GEMM."""

from __future__ import annotations

import torch

from .linear import ColumnParallelLinear, RowParallelLinear
from .rank import Rank
from .weights import Weights


class MLP:
    """[T, hidden] -> [T, hidden], this rank's share of a sum.

    activation: "silu" or "gelu", as in ModelConfig.
    """

    def __init__(self, weights: Weights, activation: str, rank: Rank) -> None:
        self._activation = activation
        self._gate_up = ColumnParallelLinear(weights, ("gate_proj", "up_proj"), rank, is_gated=True)
        self.reads = self._gate_up.reads
        self._down = RowParallelLinear(weights, "down_proj", rank)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(self._gate_up.gated(x, self._activation))
