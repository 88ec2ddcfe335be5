"""Memory of a rank that all ranks can write to, and a meeting after which all have written.

The sampler moves logits through it (sampling/cuda/moving.py): each rank stores what
another is to have in that one's memory, all meet, and everybody reads its own.
"""

from __future__ import annotations

from typing import Protocol

import torch
import triton
import triton.language as tl

from .one_shot import meet


class PeerMemory(Protocol):
    """mine: uint8, this rank's.  addresses: int64 [size], where every rank has its own."""

    @property
    def mine(self) -> torch.Tensor: ...

    @property
    def addresses(self) -> torch.Tensor: ...

    def meet(self, count: torch.Tensor) -> None:
        """In stream order: what all ranks have stored before their meet() can be read after it.

        count: int32 [1] on the device, the same on all ranks; nobody waits where it is 0.
        """
        ...


class CudaPeerMemory:
    """Over memory that is mapped by all ranks, with their flags at its end, which are zero."""

    def __init__(
        self, memory: torch.Tensor, addresses: torch.Tensor, rank: int, flags_at: int
    ) -> None:
        self.mine = memory[:flags_at]
        self.addresses = addresses
        self._rank = rank
        self._flags = addresses + flags_at
        self._epoch = torch.zeros(1, dtype=torch.int32, device=memory.device)

    def meet(self, count: torch.Tensor) -> None:
        """See PeerMemory."""
        _meet_if[(1,)](
            self._flags, self._epoch, count, self._rank, SIZE=len(self._flags), num_warps=1
        )


@triton.jit(do_not_specialize=["rank"])
def _meet_if(flags, epochs, count, rank, SIZE: tl.constexpr):
    """One program.  flags: int64 [SIZE], addresses of int32 [SIZE]; epochs: int32 [1]."""
    if tl.load(count) > 0:
        epoch = tl.load(epochs) + 1
        meet(flags, rank, 0, epoch, SIZE)
        tl.store(epochs, epoch)
