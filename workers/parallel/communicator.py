"""What the ranks of a tensor-parallel group do together, whatever connects them.

Layers sum partial results with all_reduce (Communicator); the samplers share
logits and gather token ids, which differs by device (Host-, DeviceCommunicator).
Collectives: every rank makes the same calls in the same order, with the same
shapes.  SingleRank is the group of one; shared.SharedMemoryCommunicator connects
processes on CPU, cuda.CudaCommunicator processes with a GPU each.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt
import torch

if TYPE_CHECKING:
    from .peers import PeerMemory

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

        Every rank ends with the same bits, in every run: on CPU the sum is
        made in float32 in the order of the ranks, and rounded once.
        """
        ...

    def sum_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        inner: torch.Tensor | None = None,
        ahead: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """all_reduce(x) and Kernels.add_rms_norm in one; x [T, hidden] is not needed any more.

        ahead: weights that are read next, see Kernels.reads; they may be fetched meanwhile.
        None, and nothing done, where two calls are as good.
        """
        ...


class HostCommunicator(Communicator, Protocol):
    """With what the CPU sampler needs."""

    def share_logits(self, shard: torch.Tensor) -> list[Float32Array]:
        """Every rank's shard [R, V / size] float32, in the order of the ranks.

        The arrays must not be written to and are valid until this rank's next
        collective.
        """
        ...

    def all_gather_int32(self, mine: Int32Array) -> Int32Array:
        """Every rank's [n] as the rows of a new [size, n]."""
        ...


class DeviceCommunicator(Communicator, Protocol):
    """With what the GPU sampler needs: into buffers of the caller, in the current stream."""

    @property
    def has_peer_memory(self) -> bool:
        """Whether ranks can write to each other's memory; the same on all of them."""
        ...

    def all_gather(self, mine: torch.Tensor, out: torch.Tensor) -> None:
        """out [size, *mine.shape] = every rank's `mine`, in the order of the ranks."""
        ...

    def peer_memory(self, nbytes: int) -> PeerMemory:
        """nbytes of every rank for all to write to; a collective, at start-up.

        Only where there is has_peer_memory.
        """
        ...


class Unfused:
    """For communicators that have no kernel for a sum and its norm."""

    def sum_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        inner: torch.Tensor | None = None,
        ahead: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        return None


class SingleRank(Unfused):
    """The communicator of a rank that is alone, on any device."""

    rank = 0
    size = 1
    has_peer_memory = False

    def all_reduce(self, x: torch.Tensor) -> None:
        pass

    def share_logits(self, shard: torch.Tensor) -> list[Float32Array]:
        return [shard.numpy()]

    def all_gather_int32(self, mine: Int32Array) -> Int32Array:
        return mine[np.newaxis].copy()

    def all_gather(self, mine: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(mine.unsqueeze(0))

    def peer_memory(self, nbytes: int) -> PeerMemory:
        raise ValueError("one rank has no peers")
