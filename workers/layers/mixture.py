"""A mixture of experts: a router picks some of many gated MLPs for each token.

Experts are split over the ranks as dense MLPs are: each rank holds its part of
every expert, so that all ranks have the same work whatever the router picks.
The router is whole on every rank, and its picks are the same.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .rank import Rank
from .weights import Weights


class MixtureOfExperts:
    """[T, hidden] -> [T, hidden], this rank's share of a sum.

    chosen: experts a token.  normalise: their weights are made to sum up to 1.
    """

    def __init__(
        self, weights: Weights, experts: int, chosen: int, normalise: bool, rank: Rank
    ) -> None:
        self._kernels = rank.kernels
        self._chosen = chosen
        self._normalise = normalise
        router = rank.kernels.fetch(weights["gate.weight"])
        self._router = rank.kernels.pack_linear(router, None, torch.float32)

        def gate_up() -> Iterator[torch.Tensor]:
            for index in range(experts):
                expert = weights.at(f"experts.{index}")
                halves = (expert["gate_proj.weight"], expert["up_proj.weight"])
                yield torch.cat([rank.share(half, 0) for half in halves])

        def down() -> Iterator[torch.Tensor]:
            for index in range(experts):
                weight = weights.at(f"experts.{index}")["down_proj.weight"]
                yield rank.share(weight, 1).contiguous()

        self._gate_up = rank.kernels.pack_experts(gate_up(), experts)
        self._down = rank.kernels.pack_experts(down(), experts)

    def reads(self, rows: int) -> torch.Tensor | None:
        """See Kernels.reads: which experts, only the router says."""
        return None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        kernels = self._kernels
        scores = kernels.linear(x, self._router)
        return kernels.experts(x, scores, self._gate_up, self._down, self._chosen, self._normalise)
