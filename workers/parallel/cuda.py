"""Collectives of ranks that are processes with a GPU each, in streams and in graphs.

Made by a GPU worker before it captures its graphs.  Nothing here waits for a
GPU after that.  Three ways to sum, of which `tune` measures the best by size:

    one_shot   our kernel (one_shot.py): copies, meets and sums in one launch, or some pieces
    two_shot   PyTorch's, over symmetric memory: every rank sums a part for all
    nccl       for what is much larger than the symmetric memory

The first adds in float32 in the order of the ranks; the others add bfloat16,
which is the same for two ranks.  All give every rank the same bits.  NVLink
multicast is never asked for.

A sum that is added to the residual stream and normalised can be all of that in
one kernel (sum_norm.py); that, too, is where it is measured to be faster.

Before `tune`, and with `--batch-invariant` there is none, all sums are one_shot's, a large
one's in pieces: the others round otherwise, and a row would see how many there are beside it.

A rank that dies leaves its peers spinning in a kernel: the deadline of a step
ends the group, not this file.  While the group forms, waits have deadlines and
name the missing ranks.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed._symmetric_memory as symmetric_memory
import triton
from torch._C._distributed_c10d import _SymmetricMemory

from ..kernels.cuda.ahead import part_of
from ..kernels.cuda.norm import norm_warps, rms_norm
from ..kernels.cuda.overlap import overlapped
from .graph_time import graph_us
from .one_shot import PROGRAMS, block_of, one_shot
from .peers import CudaPeerMemory
from .sum_bytes import PIECES_BYTES, SLAB_BYTES
from .sum_norm import NORM_PROGRAMS, NOTHING, sum_norm

if TYPE_CHECKING:
    from ...ipc.config import ActorSpec

ONE_SHOT, TWO_SHOT, NCCL = METHODS = ("one_shot", "two_shot", "nccl")

APART, TOGETHER = FUSIONS = ("apart", "together")
"""How a sum is normalised: by two kernels, or by one (sum_norm.py)."""

_INBOX_BYTES = 4 << 20
"""What a rank may send for one sum_norm: 512 rows of 4,096 in bfloat16."""

_AHEAD_BYTES = 8 << 20
"""Of the next weights, fetched beside a sum_norm (ahead.py): as much as comes in its time."""

_FORMING_S = 300.0
"""How long a rank waits for others that still load their weights."""

_LAST_LOOK_S = 0.01
"""For each rank, when that time is over."""

_ALIGNMENT = 16
_FIRST_SIZE_BITS = 13
_ARRIVED = "albireo/rank{}"


class GroupNotFormed(RuntimeError):
    """The ranks of a group did not find each other; the text names the missing ones."""


def create_communicator(
    spec: ActorSpec, fds: Mapping[str, int], device: torch.device, width: int
) -> CudaCommunicator:
    """A worker's, tuned for rows of `width`.

    Its rendezvous file is named by group and incarnation; fds: not used.
    """
    path = f"{spec.runtime_dir}/g{spec.group}.{spec.incarnation}.store"
    communicator = CudaCommunicator(
        path, spec.rank, spec.engine.tp, device, max(spec.engine.step_timeout_s, _FORMING_S)
    )
    if not spec.engine.batch_invariant:
        communicator.tune(width, getattr(torch, spec.engine.dtype))
    return communicator


class CudaCommunicator:
    """Rank `rank` of `size` >= 2; a process can have one.

    store_path: a file that does not exist yet, the same for all ranks and for
    no other group.  timeout_s: how long to wait for the other ranks here.
    sums_us: fastest_sums() of what `tune` measured here.
    Raises GroupNotFormed.
    """

    def __init__(
        self, store_path: str, rank: int, size: int, device: torch.device, timeout_s: float
    ) -> None:
        if size < 2:
            raise ValueError(f"{size} rank has nobody to talk to: use SingleRank")
        self.rank = rank
        self.size = size
        self._device = device
        store = _meet(store_path, rank, size, timeout_s)
        try:
            dist.init_process_group(
                "nccl",
                store=store,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_s),
                device_id=device,
            )
            group = dist.group.WORLD
            assert group is not None
            self._group: Any = group
            self._group_name: Any = group.group_name
            self._symmetric = _Symmetric(rank, size, device, group)
        except RuntimeError as error:
            raise GroupNotFormed(
                f"rank {rank} of {size} ({device}) could not connect to the other ranks' GPUs: "
                f"{error}"
            ) from error
        self.sums_us: dict[int, float] = {}
        self._method_by_bits: tuple[str, ...] = ()
        self._fusion_by_bits: tuple[str, ...] = ()
        self._rows_of: tuple[int, torch.dtype] | None = None

    def all_reduce(self, x: torch.Tensor) -> None:
        """Sums x over all ranks, in place; x is contiguous, bfloat16 or float32."""
        if x.dtype not in (torch.bfloat16, torch.float32) or not x.is_contiguous():
            raise ValueError(
                f"all_reduce takes contiguous bfloat16 or float32, not {x.dtype} of strides "
                f"{x.stride()} and shape {tuple(x.shape)}"
            )
        if x.numel():
            self._sum(x, self.method_for(x.numel() * x.element_size()))

    def all_gather(self, mine: torch.Tensor, out: torch.Tensor) -> None:
        """out [size, *mine.shape] = every rank's `mine`, in the order of the ranks; contiguous."""
        if mine.element_size() == 4 and mine.numel() * 4 <= SLAB_BYTES:
            self._symmetric.launch(mine.view(torch.int32), out.view(torch.int32), reduce=False)
        else:
            dist.all_gather_into_tensor(out.view(-1), mine.view(-1))

    def peer_memory(self, nbytes: int) -> CudaPeerMemory:
        """nbytes on every rank, zero; all ranks ask for the same, before they capture graphs."""
        flags_at = -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        total = flags_at + 4 * self.size
        memory, addresses = _map(total, self.rank, self._device, self._group)
        return CudaPeerMemory(memory, addresses, self.rank, flags_at)

    def method_for(self, nbytes: int) -> str:
        """How all_reduce sums nbytes; see the module."""
        if not self._method_by_bits:
            return ONE_SHOT
        if nbytes > SLAB_BYTES:
            in_pieces = nbytes <= PIECES_BYTES and self._method_by_bits[-1] == ONE_SHOT
            return ONE_SHOT if in_pieces else NCCL
        bits = max((nbytes - 1).bit_length(), _FIRST_SIZE_BITS)
        return self._method_by_bits[bits - _FIRST_SIZE_BITS]

    def sum_norm(
        self,
        x: torch.Tensor,
        residual: torch.Tensor,
        weight: torch.Tensor,
        eps: float,
        inner: torch.Tensor | None = None,
        ahead: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """See Communicator."""
        rows, width = x.shape
        if self.fusion_for(rows, x.nbytes) == APART or (width, x.dtype) != self._rows_of:
            return None
        return self._symmetric.sum_norm(x, residual, weight, eps, inner, ahead)

    def fusion_for(self, rows: int, nbytes: int) -> str:
        """How sum_norm does rows of nbytes in all."""
        if not rows or not self._fusion_by_bits or not self._symmetric.fits(rows, nbytes):
            return APART
        bits = min((rows - 1).bit_length(), len(self._fusion_by_bits) - 1)
        return self._fusion_by_bits[bits]

    def tune(
        self, width: int, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]]:
        """Chooses the methods by rank 0's clock, for a model with rows of `width`.

        All ranks call it together; takes about a second.  Returns microseconds by bytes
        and method of all_reduce, and by rows and fusion of sum_norm; they are rank 0's
        own on rank 0.
        """
        sums: dict[int, dict[str, float]] = {}
        for bits in range(_FIRST_SIZE_BITS, SLAB_BYTES.bit_length()):
            x = torch.zeros((1 << bits) // 2, dtype=torch.bfloat16, device=self._device)
            sums[1 << bits] = {
                method: graph_us(partial(self._sum, x, method), self._device) for method in METHODS
            }
        self._method_by_bits = self._agree(sums, METHODS)
        norms: dict[int, dict[str, float]] = {}
        self._rows_of = width, dtype
        rows = 1
        while self._symmetric.fits(rows, rows * width * dtype.itemsize):
            norms[rows] = self._measure_norms(rows, width, dtype)
            rows *= 2
        self._fusion_by_bits = self._agree(norms, FUSIONS)
        self.sums_us = fastest_sums(sums, norms, width * dtype.itemsize)
        return sums, norms

    def _agree(
        self, times: Mapping[int, Mapping[str, float]], names: tuple[str, ...]
    ) -> tuple[str, ...]:
        """The fastest of `names` for each size, as rank 0 has it."""
        fastest = [min(each, key=each.__getitem__) for each in times.values()]
        chosen = [names.index(name) for name in fastest]
        table = torch.tensor(chosen, dtype=torch.int32, device=self._device)
        dist.broadcast(table, 0)
        return tuple(names[index] for index in table.tolist())

    def _measure_norms(self, rows: int, width: int, dtype: torch.dtype) -> dict[str, float]:
        x, residual = (torch.zeros(rows, width, dtype=dtype, device=self._device) for _ in "xr")
        weight = torch.ones(width, device=self._device)

        def apart() -> None:
            self.all_reduce(x)
            rms_norm(x, residual, weight, 1e-6)

        def together() -> None:
            self._symmetric.sum_norm(x, residual, weight, 1e-6, None, None)

        ways: dict[str, Callable[[], None]] = {APART: apart, TOGETHER: together}
        return {way: graph_us(run, self._device) for way, run in ways.items()}

    def close(self) -> None:
        """Leaves the group; no other rank need be there."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _sum(self, x: torch.Tensor, method: str) -> None:
        if method == ONE_SHOT:
            whole = x.nbytes <= SLAB_BYTES
            for piece in (x,) if whole else x.view(-1).split(SLAB_BYTES // x.element_size()):
                self._symmetric.launch(piece, piece, reduce=True)
        elif method == TWO_SHOT:
            shared = self._symmetric.part(x.numel(), x.dtype)
            shared.copy_(x.view(-1))
            torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._group_name)
            x.view(-1).copy_(shared)
        else:
            dist.all_reduce(x)


def fastest_sums(
    sums: Mapping[int, Mapping[str, float]],
    norms: Mapping[int, Mapping[str, float]],
    row_bytes: int,
) -> dict[int, float]:
    """Microseconds of a sum by its bytes, at best: of so many rows with their normalisation, where
    that is one kernel and faster than a sum alone, and of more by the fastest method.

    sums, norms: as tune() returns them.
    """
    sizes = sorted(sums)
    alone = [min(sums[nbytes].values()) for nbytes in sizes]
    found = {
        rows * row_bytes: min(us[TOGETHER], float(np.interp(rows * row_bytes, sizes, alone)))
        for rows, us in norms.items()
    }
    largest = max(found, default=0)
    found |= {nbytes: us for nbytes, us in zip(sizes, alone, strict=True) if nbytes > largest}
    return {nbytes: round(us, 2) for nbytes, us in found.items()}


class _Symmetric:
    """Memory that all ranks have mapped: a part for two_shot, then what our kernels need.

    part | slab | slab | flags | inbox | inbox     see one_shot.py and sum_norm.py
    """

    def __init__(self, rank: int, size: int, device: torch.device, group: Any) -> None:
        self._rank = rank
        self._size = size
        flag_bytes = -(-PROGRAMS * size * 4 // _ALIGNMENT) * _ALIGNMENT
        inboxes_at = 3 * SLAB_BYTES + flag_bytes
        total = inboxes_at + 2 * size * _INBOX_BYTES
        self._memory, start = _map(total, rank, device, group)
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

    def fits(self, rows: int, nbytes: int) -> bool:
        """Whether sum_norm can do it: each row is where 16 bytes can be loaded at once."""
        return nbytes <= _INBOX_BYTES and nbytes // rows % _ALIGNMENT == 0

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


def _map(
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


def _meet(store_path: str, rank: int, size: int, timeout_s: float) -> Any:
    """A store at which all ranks have arrived."""
    store = dist.FileStore(store_path, size)  # type: ignore[attr-defined]
    store.set(_ARRIVED.format(rank), str(os.getpid()))
    missing: list[int] = []
    deadline_s = time.monotonic() + timeout_s
    for peer in range(size):
        # One deadline for all: who has not come by then is named.
        left_s = max(deadline_s - time.monotonic(), _LAST_LOOK_S)
        try:
            store.wait([_ARRIVED.format(peer)], timedelta(seconds=left_s))
        except (RuntimeError, ValueError):
            missing.append(peer)
    if missing:
        ranks = ", ".join(map(str, missing))
        raise GroupNotFormed(
            f"rank {rank} of {size} waited {timeout_s:g} s at {store_path} for rank {ranks}: "
            "it has failed or is still loading; see its log"
        )
    return store
