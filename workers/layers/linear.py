"""Linear layers split over the ranks of a group (Megatron's two kinds).

    ColumnParallel  every rank computes a part of the outputs, from all inputs
    RowParallel     every rank takes its part of the inputs; outputs are summed

One after the other, as in attention and in the MLP, they need one all-reduce,
which RMSNorm.add makes of the shares that the second leaves.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from .rank import Rank
from .weights import Weights


class ColumnParallelLinear:
    """[T, in] -> [T, this rank's outputs], several projections of the same input as one GEMM.

    names: the projections ("q_proj", "k_proj", "v_proj"); each is split by its
    outputs, and a rank's parts lie side by side in their order.
    is_gated: for `gated`, and not to be called.
    """

    def __init__(
        self, weights: Weights, names: Sequence[str], rank: Rank, is_gated: bool = False
    ) -> None:
        parts = [rank.share(weights[f"{name}.weight"], 0) for name in names]
        biases = [weights.find(f"{name}.bias") for name in names]
        shares = [rank.share(bias, 0) for bias in biases if bias is not None]
        self._kernels = rank.kernels
        self._packed = rank.kernels.pack_linear(
            torch.cat(parts), torch.cat(shares) if shares else None, gated=is_gated
        )

    def reads(self, rows: int) -> torch.Tensor | None:
        """See Kernels.reads."""
        return self._kernels.reads(self._packed, rows)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear(x, self._packed)

    def gated(self, x: torch.Tensor, activation: str) -> torch.Tensor:
        """[T, in] -> [T, half of this rank's outputs]; see Kernels.gated_linear."""
        return self._kernels.gated_linear(x, self._packed, activation)


class RowParallelLinear:
    """[T, this rank's inputs] -> [T, out], this rank's share of a sum.  Rank 0 adds the bias."""

    def __init__(self, weights: Weights, name: str, rank: Rank) -> None:
        weight = rank.share(weights[f"{name}.weight"], 1)
        bias = weights.find(f"{name}.bias") if rank.index == 0 else None
        self._kernels = rank.kernels
        self._packed = rank.kernels.pack_linear(weight.contiguous(), bias)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._kernels.linear(x, self._packed)
