"""Memory that all ranks have mapped, and the kernels that sum and gather through it.

    part | slab | slab | flags | inbox | inbox

The part is for PyTorch's two_shot; see one_shot.py for slabs and flags, sum_norm.py for inboxes.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
import triton
from torch._C._distributed_c10d import _SymmetricMemory

from ..kernels.cuda.ahead import part_of
from ..kernels.cuda.norm import norm_warps
from ..kernels.cuda.overlap import overlapped
from .one_shot import PROGRAMS, block_of, one_shot
from .sum_bytes import SLAB_BYTES
from .sum_norm import NORM_PROGRAMS, NOTHING, sum_norm

ALIGNMENT = 16

_INBOX_BYTES = 4 << 20
"""What a rank may send for one sum_norm: 512 rows of 4,096 in bfloat16."""

_AHEAD_BYTES = 8 << 20
"""Of the next weights, fetched beside a sum_norm (ahead.py): as much as comes in its time."""


def fits(rows: int, nbytes: int) -> bool:
    """Whether sum_norm can do it: each row is where 16 bytes can be loaded at once."""
    return nbytes <= _INBOX_BYTES and nbytes // rows % ALIGNMENT == 0


class SymmetricMemory:
    """What a rank's collectives by kernels of ours need; all ranks make theirs together."""

    def __init__(self, rank: int, size: int, device: torch.device, group: Any) -> None:
        self._rank = rank
        self._size = size
        flag_bytes = -(-PROGRAMS * size * 4 // ALIGNMENT) * ALIGNMENT
        inboxes_at = 3 * SLAB_BYTES + flag_bytes
        total = inboxes_at + 2 * size * _INBOX_BYTES
        self._memory, start = map_on_all(total, rank, device, group)
        self._slabs = start + SLAB_BYTES
        self._flags = start + 3 * SLAB_BYTES
        self._inboxes = start + inboxes_at
        self._memory[inboxes_at:].view(torch.int32).fill_(NOTHING)
        _barrier(device)
        self._epochs = torch.zeros(PROGRAMS, dtype=torch.int32, device=device)
        self._norm_epochs = torch.zeros(NORM_PROGRAMS, dtype=torch.int32, device=device)

    def part(self, length: int, dtype: torch.dtype) -> torch.Tensor:
        """Symmetric memory of `length` values, at most SLAB_BYTES."""
        return self._memory[: length * dtype.itemsize].view(dtype)

    def launch(self, x: torch.Tensor, out: torch.Tensor, reduce: bool) -> None:
        """See one_shot."""
        length = x.numel()
        one_shot[(PROGRAMS,)](
            x, out, self._slabs, self._flags, self._epochs, length, SLAB_BYTES, self._rank,
            SIZE=self._size, BLOCK=block_of(length), REDUCE=reduce,
            num_warps=8, **overlapped(x.device),
        )  # fmt: skip

    def sum_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        inner: torch.Tensor | None,
        ahead: torch.Tensor | None,
    ) -> torch.Tensor:
        """See sum_norm.py; x fits()."""
        rows, width = x.shape
        padded = triton.next_power_of_2(width)
        out = torch.empty_like(x)
        warps = norm_warps(padded)
        fetch = part_of(ahead, _AHEAD_BYTES, 32 * warps)
        programs = min(rows, NORM_PROGRAMS)
        sum_norm[(programs + fetch.programs,)](
            x, residual, weight if inner is None else inner, weight, out,
            self._inboxes, self._norm_epochs, rows, programs, _INBOX_BYTES // 4, self._rank, eps,
            x if ahead is None else ahead, fetch.rows, fetch.row_bytes, fetch.part_bytes,
            SIZE=self._size, WIDTH=width, PADDED=padded, INNER=inner is not None,
            THREADS=32 * warps, num_warps=warps, **overlapped(x.device),
        )  # fmt: skip
        return out


def map_on_all(
    nbytes: int, rank: int, device: torch.device, group: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(this rank's uint8 [nbytes], zero; int64 [size], the addresses of all ranks')."""
    # What symmetric_memory.empty() calls, which imports SymPy on the way: 0.3 to 2.6 s.
    memory = _SymmetricMemory.empty_strided_p2p((nbytes,), (1,), torch.uint8, device)
    memory.zero_()
    handle = symmetric_memory.rendezvous(memory, group)
    # An allocation may lie inside a larger block, at the same place on every rank.
    inside = memory.data_ptr() - handle.buffer_ptrs[rank]
    start = torch.tensor(handle.buffer_ptrs, dtype=torch.int64, device=device) + inside
    _barrier(device)
    return memory, start


def _barrier(device: torch.device) -> None:
    """Nobody's memory may be touched before it is as it begins."""
    dist.barrier(device_ids=[device.index])
    torch.cuda.synchronize(device)
