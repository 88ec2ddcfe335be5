"""What the ranks of a tensor-parallel group do together, whatever connects them.

Layers sum partial results with all_reduce; the sampler shares logits and
gathers token ids.  Collectives: every rank makes the same calls in the same
order, with the same shapes.  SingleRank is the group of one;
shared.SharedMemoryCommunicator connects processes on CPU.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]


class Communicator(Protocol):
    """One rank's way to the others."""

    @property
    def rank(self) -> int: ...

    @property
    def size(self) -> int: ...

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sums x over all ranks, in place; x is contiguous, bfloat16 or float32.

        Added in float32 in the order of the ranks and rounded once, so every
        rank ends with the same bits, in every run.
        """
        ...

    def share_logits(self, shard: torch.Tensor) -> list[Float32Array]:
        """Every rank's shard [R, V / size] float32, in the order of the ranks.

        The arrays must not be written to and are valid until this rank's next
        collective.
        """
        ...

    def all_gather_int32(self, mine: Int32Array) -> Int32Array:
        """Every rank's [n] as the rows of a new [size, n]."""
        ...


class SingleRank:
    """The communicator of a rank that is alone."""

    rank = 0
    size = 1

    def all_reduce(self, x: torch.Tensor) -> None:
        pass

    def share_logits(self, shard: torch.Tensor) -> list[Float32Array]:
        return [shard.numpy()]

    def all_gather_int32(self, mine: Int32Array) -> Int32Array:
        return mine[np.newaxis].copy()
