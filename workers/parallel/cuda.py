"""Collectives of ranks that are processes with a GPU each, in streams and in graphs.

Made by a GPU worker before it captures its graphs.  Nothing here waits for a
GPU after that.  Three ways to sum, of which `tune` measures the best by size:

    one_shot   our kernel (one_shot.py): copies, meets and sums in one launch, or some pieces
    two_shot   PyTorch's, over symmetric memory: every rank sums a part for all
    nccl       for what is much larger than the symmetric memory, or where there is none

The first adds in float32 in the order of the ranks; the others add bfloat16,
which is the same for two ranks.  All give every rank the same bits.  There is
symmetric memory where the driver lets each GPU map every other one's, over NVLink or PCIe;
NCCL_P2P_DISABLE=1 says that it is not to be used.  NVLink multicast stays off (multicast.py).

A sum that is added to the residual stream and normalised can be all of that in
one kernel (sum_norm.py); that, too, is where it is measured to be faster.

Before `tune`, and with `--batch-invariant` there is none, all sums are one_shot's, a large
one's in pieces: the others round otherwise, and a row would see how many there are beside it.

A rank that dies leaves its peers spinning in a kernel: the deadline of a step
ends the group, not this file.  While the group forms, waits have deadlines and
name the missing ranks.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from ..kernels.cuda.norm import rms_norm
from .graph_time import graph_us
from .multicast import stay_off
from .peers import CudaPeerMemory
from .sum_bytes import PIECES_BYTES, SLAB_BYTES
from .symmetric import ALIGNMENT, SymmetricMemory, fits, map_on_all

if TYPE_CHECKING:
    from ...ipc.config import ActorSpec

_log = logging.getLogger(__name__)

ONE_SHOT, TWO_SHOT, NCCL = METHODS = ("one_shot", "two_shot", "nccl")

APART, TOGETHER = FUSIONS = ("apart", "together")
"""How a sum is normalised: by two kernels, or by one (sum_norm.py)."""

_FORMING_S = 300.0
"""How long a rank waits for others that still load their weights."""

_LAST_LOOK_S = 0.01
"""For each rank, when that time is over."""

_FIRST_SIZE_BITS = 13
_NO_PEERS = "NCCL_P2P_DISABLE"
"""A variable that users of machines know on which GPUs can map each other and had better not."""
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
    if spec.engine.batch_invariant:
        _check_invariant(communicator)
    else:
        communicator.tune(width, getattr(torch, spec.engine.dtype))
    return communicator


def _check_invariant(communicator: CudaCommunicator) -> None:
    if not communicator.has_peer_memory and communicator.size > 2:
        raise GroupNotFormed(
            f"--batch-invariant is not to be had on {communicator.size} ranks whose GPUs do not "
            "map each other's memory: NCCL adds in an order that depends on the size of the sum. "
            "Use two ranks, or GPUs with NVLink or peer access over PCIe"
        )


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
        stay_off()
        store = _meet(store_path, rank, size, timeout_s)
        self._symmetric: SymmetricMemory | None = None
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
            if _all_map(device, size):
                self._symmetric = SymmetricMemory(rank, size, device, group)
        except RuntimeError as error:
            raise GroupNotFormed(
                f"rank {rank} of {size} ({device}) could not connect to the other ranks' GPUs: "
                f"{error}"
            ) from error
        self.sums_us: dict[int, float] = {}
        self._method_by_bits: tuple[str, ...] = ()
        self._fusion_by_bits: tuple[str, ...] = ()
        self._rows_of: tuple[int, torch.dtype] | None = None

    @property
    def has_peer_memory(self) -> bool:
        """See DeviceCommunicator."""
        return self._symmetric is not None

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
        small = mine.element_size() == 4 and mine.numel() * 4 <= SLAB_BYTES
        if small and self._symmetric is not None:
            self._symmetric.launch(mine.view(torch.int32), out.view(torch.int32), reduce=False)
        else:
            dist.all_gather_into_tensor(out.view(-1), mine.view(-1))

    def peer_memory(self, nbytes: int) -> CudaPeerMemory:
        """See DeviceCommunicator.  They are zero; before graphs are captured."""
        flags_at = -(-nbytes // ALIGNMENT) * ALIGNMENT
        total = flags_at + 4 * self.size
        memory, addresses = map_on_all(total, self.rank, self._device, self._group)
        return CudaPeerMemory(memory, addresses, self.rank, flags_at)

    def method_for(self, nbytes: int) -> str:
        """How all_reduce sums nbytes; see the module."""
        if not self._method_by_bits:
            return NCCL if self._symmetric is None else ONE_SHOT
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
        assert self._symmetric is not None
        return self._symmetric.sum_norm(x, residual, weight, eps, inner, ahead)

    def fusion_for(self, rows: int, nbytes: int) -> str:
        """How sum_norm does rows of nbytes in all."""
        if not rows or not self._fusion_by_bits or not fits(rows, nbytes):
            return APART
        bits = min((rows - 1).bit_length(), len(self._fusion_by_bits) - 1)
        return self._fusion_by_bits[bits]

    def tune(
        self, width: int, dtype: torch.dtype = torch.bfloat16
    ) -> tuple[dict[int, dict[str, float]], dict[int, dict[str, float]]]:
        """Chooses the methods by rank 0's clock, for a model with rows of `width`.

        All ranks call it together; takes about a second.  Returns microseconds by bytes
        and method of all_reduce, and by rows and fusion of sum_norm; they are rank 0's
        own on rank 0.  Without symmetric memory there is nothing to choose: NCCL's alone.
        """
        symmetric = self._symmetric
        methods = (NCCL,) if symmetric is None else METHODS
        sums: dict[int, dict[str, float]] = {}
        for bits in range(_FIRST_SIZE_BITS, SLAB_BYTES.bit_length()):
            x = torch.zeros((1 << bits) // 2, dtype=torch.bfloat16, device=self._device)
            sums[1 << bits] = {
                method: graph_us(partial(self._sum, x, method), self._device) for method in methods
            }
        self._method_by_bits = self._agree(sums, METHODS)
        norms: dict[int, dict[str, float]] = {}
        self._rows_of = width, dtype
        rows = 1
        while symmetric is not None and fits(rows, rows * width * dtype.itemsize):
            norms[rows] = self._measure_norms(symmetric, rows, width, dtype)
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

    def _measure_norms(
        self, symmetric: SymmetricMemory, rows: int, width: int, dtype: torch.dtype
    ) -> dict[str, float]:
        x, residual = (torch.zeros(rows, width, dtype=dtype, device=self._device) for _ in "xr")
        weight = torch.ones(width, device=self._device)

        def apart() -> None:
            self.all_reduce(x)
            rms_norm(x, residual, weight, 1e-6)

        def together() -> None:
            symmetric.sum_norm(x, residual, weight, 1e-6, None, None)

        ways: dict[str, Callable[[], None]] = {APART: apart, TOGETHER: together}
        return {way: graph_us(run, self._device) for way, run in ways.items()}

    def close(self) -> None:
        """Leaves the group; no other rank need be there."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def _sum(self, x: torch.Tensor, method: str) -> None:
        if method == NCCL:
            dist.all_reduce(x)
            return
        assert self._symmetric is not None
        if method == ONE_SHOT:
            whole = x.nbytes <= SLAB_BYTES
            for piece in (x,) if whole else x.view(-1).split(SLAB_BYTES // x.element_size()):
                self._symmetric.launch(piece, piece, reduce=True)
        else:
            shared = self._symmetric.part(x.numel(), x.dtype)
            shared.copy_(x.view(-1))
            torch.ops.symm_mem.two_shot_all_reduce_(shared, "sum", self._group_name)
            x.view(-1).copy_(shared)


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


def _all_map(device: torch.device, size: int) -> bool:
    """Whether every GPU of the group can map every other one's memory: all ranks have the answer.

    A process sees the group's GPUs, numbered by rank.
    """
    others = (peer for peer in range(size) if peer != device.index)
    mine = os.environ.get(_NO_PEERS) != "1" and all(
        torch.cuda.can_device_access_peer(device, peer) for peer in others
    )
    all_ones = torch.tensor([int(mine)], dtype=torch.int32, device=device)
    dist.all_reduce(all_ones, op=dist.ReduceOp.MIN)
    found = bool(all_ones.item())
    if not found:
        _log.warning(
            "the GPUs of this group do not map each other's memory (%s, or no path for it): all "
            "they do together goes through NCCL, which is slower",
            _NO_PEERS,
        )
    return found


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
