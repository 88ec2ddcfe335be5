"""A layer's place in its TP group: what layers know about ranks, and models do not."""

from __future__ import annotations

import torch

from ..kernels.interface import Kernels
from ..parallel.communicator import Communicator, SingleRank


class Rank:
    """Rank `index` of `size`, its kernels, and its way to the other ranks.

    One object for all layers of a model: a worker sets `communicator` when it
    has one, after the weights were loaded and the process was forked.
    """

    def __init__(self, index: int, size: int, kernels: Kernels) -> None:
        self.index = index
        self.size = size
        self.kernels = kernels
        self._communicator: Communicator | None = SingleRank() if size == 1 else None

    @property
    def communicator(self) -> Communicator:
        """Raises RuntimeError while a rank of several has none."""
        if self._communicator is None:
            raise RuntimeError(
                f"rank {self.index} of {self.size} has no communicator: set Model.communicator"
            )
        return self._communicator

    @communicator.setter
    def communicator(self, communicator: Communicator) -> None:
        if (communicator.rank, communicator.size) != (self.index, self.size):
            raise ValueError(
                f"the communicator is rank {communicator.rank} of {communicator.size}, but the "
                f"weights are those of rank {self.index} of {self.size}"
            )
        self._communicator = communicator

    def add_rms_norm(
        self,
        share: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        inner: torch.Tensor | None = None,
        ahead: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Kernels.add_rms_norm of the sum of all ranks' `share`, which is overwritten.

        ahead: see Communicator.sum_norm.
        """
        if self.size > 1:
            done = self.communicator.sum_norm(share, residual, weight, eps, inner, ahead)
            if done is not None:
                return done
            self.communicator.all_reduce(share)
        return self.kernels.add_rms_norm(share, residual, weight, eps, inner)

    def share(self, weight: torch.Tensor, dim: int) -> torch.Tensor:
        """This rank's part of `weight`, on the kernels' device: a view where it is there already.

        The shape divides (ModelConfig.tp_degrees).
        """
        length = weight.shape[dim] // self.size
        return self.kernels.fetch(weight.narrow(dim, self.index * length, length))

    def keep(self, weight: torch.Tensor) -> torch.Tensor:
        """A copy on the kernels' device: `weight` may be a view of a mapped file."""
        return weight.to(self.kernels.device, copy=True)
