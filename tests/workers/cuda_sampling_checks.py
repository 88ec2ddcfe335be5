"""Checks of the GPU sampler against the CPU's, for the interpreter and for a real GPU.

One process plays all ranks of a group: InTurn lets every rank run up to its
next collective, in threads of which one runs at a time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from albireo.workers.parallel.communicator import Unfused
from albireo.workers.sampling.cuda import CudaSampler
from albireo.workers.sampling.cuda.sampler import VOCAB
from albireo.workers.sampling.params import SlotParams

from .sampling_reference import COMBINATIONS, Filters, draw, params_of, rows_of


@dataclass(frozen=True)
class Tables:
    """See sampler.SlotParameters."""

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor


def tables_of(params: SlotParams, device: str) -> Tables:
    def on_device(x: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.array(x)).to(device)

    return Tables(
        temperature=on_device(params.temperature),
        top_k=on_device(params.top_k),
        top_p=on_device(params.top_p),
        min_p=on_device(params.min_p),
        seed=on_device(params.seed.view(np.int64)),
    )


def random_params(random: np.random.Generator, count: int, vary: bool = True) -> SlotParams:
    """Every combination of filters, and every seventh row greedy; seeds of all 64 bits."""
    rows = [
        Filters(temperature=0.0) if i % 7 == 6 else COMBINATIONS[i % len(COMBINATIONS)]
        for i in range(count)
    ]
    if not vary:
        rows = [Filters(temperature=row.temperature) for row in rows]
    seeds = [int(seed) for seed in random.integers(0, 2**63, count)]
    params = params_of(*rows, seeds=seeds)
    params.seed[::2] |= np.uint64(1 << 63)
    return params


class InTurn:
    """The collectives of `size` ranks that are threads of this process.

    peers: whether they can write to each other's memory.
    """

    def __init__(self, size: int, device: str, peers: bool = True) -> None:
        self._size = size
        self.peers = peers
        self.device = device
        self._barrier = threading.Barrier(size)
        self._turn = threading.Lock()
        self._brought: dict[int, torch.Tensor] = {}

    def run(self, work: Callable[[Any], None]) -> None:
        """work(communicator) for every rank at once."""
        failures: list[BaseException] = []

        def run_rank(rank: int) -> None:
            try:
                with self._turn:
                    work(_Rank(self, rank, self._size))
            except BaseException as error:
                failures.append(error)
                self._barrier.abort()

        threads = [threading.Thread(target=run_rank, args=(r,)) for r in range(self._size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if failures:
            raise failures[0]

    def exchange(self, rank: int, mine: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's `mine`, in their order."""
        self._brought[rank] = mine.clone()
        self._turn.release()
        self._barrier.wait(60)
        brought = [self._brought[peer] for peer in range(self._size)]
        self._barrier.wait(60)
        self._turn.acquire()
        return brought


class _Rank(Unfused):
    def __init__(self, group: InTurn, rank: int, size: int) -> None:
        self._group = group
        self.rank = rank
        self.size = size
        self.has_peer_memory = group.peers

    def all_reduce(self, x: torch.Tensor) -> None:
        raise AssertionError("the sampler sums nothing")

    def all_gather(self, mine: torch.Tensor, out: torch.Tensor) -> None:
        out.copy_(torch.stack(self._group.exchange(self.rank, mine)))

    def peer_memory(self, nbytes: int) -> Any:
        assert self.has_peer_memory
        return _PeerMemory(self._group, self.rank, nbytes, self._group.device)


class _PeerMemory:
    """Of ranks that share a device, or a process."""

    def __init__(self, group: InTurn, rank: int, nbytes: int, device: str) -> None:
        self._group = group
        self._rank = rank
        # 16 is what CUDA's allocator gives at least.
        self.mine = torch.zeros(nbytes + 16, dtype=torch.uint8, device=device)
        self.mine = self.mine[-self.mine.data_ptr() % 16 :][:nbytes]
        address = torch.tensor([self.mine.data_ptr()], device=device)
        self.addresses = torch.cat(group.exchange(rank, address))

    def meet(self, count: torch.Tensor) -> None:
        if count.item():
            self._group.exchange(self._rank, count)


def sample(
    logits: torch.Tensor,
    params: SlotParams,
    slots: np.ndarray,
    positions: np.ndarray,
    ranks: int = 1,
    full: bool = True,
    filtered: bool = True,
    mode: str = VOCAB,
    left: list[int] | None = None,
    peers: bool = True,
) -> np.ndarray:
    """Tokens of logits [R, V] (on the device to test) by `ranks` ranks, which must agree.

    left: gets each rank's number of rows that candidates have not decided.  peers: see InTurn.
    """
    device = str(logits.device)
    count, vocab = logits.shape
    width = vocab // ranks
    given = (
        torch.from_numpy(np.asarray(slots, np.int32)).to(device),
        tables_of(params, device),
        torch.from_numpy(np.asarray(positions, np.int32)).to(device),
    )
    tokens: dict[int, np.ndarray] = {}

    def work(communicator: Any) -> None:
        rank = communicator.rank
        sampler = CudaSampler(count + 3, vocab, rank * width, communicator, device, mode)
        out = torch.full((count,), -7, dtype=torch.int32, device=device)
        shard = logits[:, rank * width : (rank + 1) * width].contiguous()
        sampler.sample(shard, *given, full, out, filtered)
        tokens[rank] = out.cpu().numpy()
        if left is not None:
            left.append(sampler.undecided)

    InTurn(ranks, device, peers).run(work)
    for rank in range(1, ranks):
        assert np.array_equal(tokens[rank], tokens[0])
    return tokens[0]


def check_equal(
    logits: np.ndarray,
    params: SlotParams,
    device: str,
    dtype: torch.dtype = torch.float32,
    ranks: int = 1,
    full: bool = True,
    filtered: bool = True,
    mode: str = VOCAB,
    left: list[int] | None = None,
    peers: bool = True,
) -> None:
    """The GPU sampler gives the CPU sampler's tokens; slots are used in another order than rows."""
    count = len(logits)
    on_device = torch.from_numpy(np.ascontiguousarray(logits, np.float32)).to(device, dtype)
    slots = np.arange(count)[::-1].copy()
    positions = np.arange(count) * 977 + 3
    tokens = sample(on_device, params, slots, positions, ranks, full, filtered, mode, left, peers)
    expected = draw(on_device.float().cpu().numpy(), rows_of(slots, positions), params)
    wrong = np.flatnonzero(tokens != expected)
    assert not len(wrong), [
        (int(i), int(tokens[i]), int(expected[i]), float(params.temperature[slots[i]]),
         int(params.top_k[slots[i]]), float(params.top_p[slots[i]]), float(params.min_p[slots[i]]))
        for i in wrong[:5]
    ]  # fmt: skip


def adversarial_rows(random: np.random.Generator, size: int) -> np.ndarray:
    """[12, size] logits: ties, all equal, one huge, both zeros, -inf, NaN, +inf, tiny, far."""
    rows = random.normal(0, 3, (12, size)).astype(np.float32)
    rows[0] = np.round(rows[0])
    rows[1] = 0.25
    rows[2] = 0.0
    rows[2, random.integers(size)] = 80.0
    rows[3] = np.where(np.arange(size) % 3 == 0, 0.0, -0.0)
    rows[4, size // 2 :] = -np.inf
    rows[5] = -np.inf
    rows[6, size // 3] = np.nan
    rows[7, size // 3] = np.inf
    rows[8] *= 1e-6
    rows[9] *= 1e30
    rows[10] = -np.inf
    rows[10, size - 1] = -1e30
    rows[11] = np.where(random.random(size) < 0.5, 4.0, 3.0)
    return rows
