"""Collectives of ranks that are processes of one machine, over shared memory (slabs.py).

Made by a worker once it is forked.  Every rank adds all ranks' contributions
itself, in the order of the ranks: the results have the same bits everywhere,
and one meeting a collective is enough.  Steady state allocates nothing but the
result of all_gather_int32.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from .communicator import Float32Array, Int32Array, Unfused
from .slabs import ALL_GATHER_INT32, ALL_REDUCE, SHARE_LOGITS, Slabs, shared_bytes, slab_bytes

__all__ = ["SharedMemoryCommunicator", "shared_bytes", "slab_bytes"]

_MAX_CACHED_LENGTHS = 64


class _Parts(NamedTuple):
    """Views of one length: of this rank's slab, of all ranks' in order, of the accumulator."""

    mine: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    rest: tuple[torch.Tensor, ...]
    total: torch.Tensor


class SharedMemoryCommunicator(Unfused):
    """See communicator.Communicator; one of `size` >= 2 ranks.

    memfd: shared_bytes() long and fresh.  max_bytes: slab_bytes(), the same on
    all ranks.  Waiting longer than timeout_s raises slabs.CollectiveTimeout,
    which names the missing ranks.
    """

    def __init__(
        self,
        memfd: int,
        rank: int,
        size: int,
        max_bytes: int,
        timeout_s: float,
        spin_us: int = 0,
    ) -> None:
        if size < 2:
            raise ValueError(f"{size} rank has nobody to talk to: use SingleRank")
        self.rank = rank
        self.size = size
        self._slabs = Slabs(memfd, rank, size, max_bytes, timeout_s, spin_us)
        self._max_length = max_bytes // 4
        shape = (2, size, self._slabs.stride // 4)
        self._floats = torch.frombuffer(self._slabs.memory, dtype=torch.float32).view(shape)
        self._float_array: Float32Array = self._floats.numpy()
        self._int_array: Int32Array = self._float_array.view(np.int32)
        self._total = torch.empty(self._max_length, dtype=torch.float32)
        self._parts: dict[int, tuple[_Parts, _Parts]] = {}

    def all_reduce(self, x: torch.Tensor) -> None:
        """See Communicator.  bfloat16 travels as float32."""
        if x.dtype not in (torch.bfloat16, torch.float32) or not x.is_contiguous():
            raise ValueError(
                f"all_reduce takes contiguous bfloat16 or float32, not {x.dtype} of strides "
                f"{x.stride()} and shape {tuple(x.shape)}"
            )
        flat = x.view(-1)
        length = flat.numel()
        parts = (self._parts.get(length) or self._views(length))[self._slabs.parity]
        parts.mine.copy_(flat)
        self._slabs.meet(ALL_REDUCE, length * 4)
        total = flat if flat.dtype is torch.float32 else parts.total
        torch.add(parts.first, parts.second, out=total)
        for shard in parts.rest:
            total.add_(shard)
        if total is not flat:
            flat.copy_(total)

    def share_logits(self, shard: torch.Tensor) -> list[Float32Array]:
        """See Communicator."""
        if shard.dtype is not torch.float32 or shard.dim() != 2:
            raise ValueError(
                f"share_logits takes float32 [R, V / size], not {shard.dtype} {tuple(shard.shape)}"
            )
        rows, width = shard.shape
        length = rows * width
        self._check_length("share_logits", length)
        parity = self._slabs.parity
        self._floats[parity, self.rank, :length].view(rows, width).copy_(shard)
        self._slabs.meet(SHARE_LOGITS, length * 4)
        return [
            self._float_array[parity, peer, :length].reshape(rows, width)
            for peer in range(self.size)
        ]

    def all_gather_int32(self, mine: Int32Array) -> Int32Array:
        """See Communicator."""
        if mine.dtype != np.int32 or mine.ndim != 1:
            raise ValueError(f"all_gather_int32 takes int32 [n], not {mine.dtype} {mine.shape}")
        length = len(mine)
        self._check_length("all_gather_int32", length)
        slabs = self._int_array[self._slabs.parity]
        slabs[self.rank, :length] = mine
        self._slabs.meet(ALL_GATHER_INT32, length * 4)
        return np.array(slabs[:, :length])

    def _views(self, length: int) -> tuple[_Parts, _Parts]:
        """Makes, and keeps, the views of a length; prefill has many lengths, decode few."""
        self._check_length("all_reduce", length)
        if len(self._parts) == _MAX_CACHED_LENGTHS:
            self._parts.clear()
        total = self._total[:length]
        even, odd = (
            _Parts(
                slabs[self.rank, :length],
                slabs[0, :length],
                slabs[1, :length],
                tuple(slabs[peer, :length] for peer in range(2, self.size)),
                total,
            )
            for slabs in self._floats
        )
        self._parts[length] = (even, odd)
        return even, odd

    def _check_length(self, operation: str, length: int) -> None:
        if length > self._max_length:
            raise ValueError(
                f"{operation} of {length} 4-byte values exceeds the {self._max_length} that the "
                "slabs were made for"
            )
