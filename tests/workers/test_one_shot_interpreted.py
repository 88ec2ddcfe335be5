"""The one-launch collectives in Triton's interpreter, between processes that share memory."""

from __future__ import annotations

import functools
import importlib
import itertools
import multiprocessing
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

from .interpreted import use_interpreter

use_interpreter()

from triton.runtime.interpreter import InterpreterBuilder  # noqa: E402

from albireo.workers.parallel.one_shot import one_shot  # noqa: E402
from albireo.workers.parallel.sum_norm import NOTHING, sum_norm  # noqa: E402

from .reference_kernels import ReferenceKernels  # noqa: E402

SLAB_BYTES = 4096
ROOM = 256
TURNS = 4
EPS = 1e-6
_LATE_S = 0.05

sum_norm_module = importlib.import_module("albireo.workers.parallel.sum_norm")


class Ranks:
    """What the ranks have mapped.

    start: of the count of collectives.  programs: of a launch.
    """

    def __init__(self, size: int, start: int, programs: int) -> None:
        def shared(count: int, dtype: torch.dtype, value: int = 0) -> list[torch.Tensor]:
            return [torch.full((count,), value, dtype=dtype).share_memory_() for _ in range(size)]

        self.size, self.start, self.programs = size, start, programs
        self.slabs = shared(2 * SLAB_BYTES, torch.uint8)
        self.flags = shared(programs * size, torch.int32, start)
        self.inboxes = shared(2 * size * ROOM, torch.int32, NOTHING)


class Rank:
    """One of them, in its process."""

    def __init__(self, ranks: Ranks, rank: int) -> None:
        self.rank, self.size, self.programs = rank, ranks.size, ranks.programs
        self._slabs, self._flags, self._inboxes = (
            torch.tensor([part.data_ptr() for part in parts])
            for parts in (ranks.slabs, ranks.flags, ranks.inboxes)
        )
        self._epochs, self._norm_epochs = (
            torch.full((self.programs,), ranks.start, dtype=torch.int32) for _ in range(2)
        )

    def collect(self, x: torch.Tensor, out: torch.Tensor, reduce: bool) -> None:
        one_shot[(self.programs,)](
            x, out, self._slabs, self._flags, self._epochs, x.numel(), SLAB_BYTES, self.rank,
            SIZE=self.size, BLOCK=64, REDUCE=reduce, OVERLAP=False,
        )  # fmt: skip

    def sum_norm(
        self, x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor,
        inner: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        rows, width = x.shape
        out = torch.empty_like(x)
        programs = min(rows, self.programs)
        sum_norm[(programs,)](
            x, residual, weight if inner is None else inner, weight, out,
            self._inboxes, self._norm_epochs, rows, programs, ROOM, self.rank, EPS, x, 0, 0, 0,
            SIZE=self.size, WIDTH=width, PADDED=64, INNER=inner is not None,
            THREADS=32, OVERLAP=False,
        )  # fmt: skip
        return out


def _brought(rank: int, turn: int, dtype: torch.dtype, length: int) -> torch.Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(10 * turn + rank)).to(dtype)


def _summed(size: int, turn: int, dtype: torch.dtype, length: int) -> torch.Tensor:
    total = torch.zeros(length)
    for peer in range(size):
        total += _brought(peer, turn, dtype, length).float()
    return total.to(dtype)


def sums_and_gathers(rank: Rank) -> list[bool]:
    right = []
    for turn in range(TURNS):
        dtype, length = (torch.bfloat16, torch.float32)[turn % 2], 300 + 57 * (turn % 3)
        x = _brought(rank.rank, turn, dtype, length)
        rank.collect(x, x, True)
        right.append(torch.equal(x, _summed(rank.size, turn, dtype, length)))
        mine = torch.arange(10, dtype=torch.int32) + 100 * rank.rank + turn
        out = torch.zeros(rank.size, 10, dtype=torch.int32)
        rank.collect(mine, out, False)
        expected = [torch.arange(10) + 100 * peer + turn for peer in range(rank.size)]
        right.append(torch.equal(out, torch.stack(expected).int()))
    return right


def sums_and_norms(rank: Rank, dtype: torch.dtype) -> list[bool]:
    """Plain sums between them, with and without an inner norm; some values are -0.0."""
    right, width = [], 48
    generator = torch.Generator().manual_seed(7)
    weight, inner = (torch.rand(width, generator=generator) + 0.5 for _ in range(2))
    for turn in range(2 * TURNS):
        rows = (1, 5, 3)[turn % 3]
        before = inner if turn % 4 > 1 else None
        length = rows * width
        x = _brought(rank.rank, turn, dtype, length).view(rows, width)
        x[0, : 2 * turn] = -0.0
        residual = torch.randn(rows, width, generator=generator).to(dtype)
        expected_residual = residual.clone()
        total = _summed(rank.size, turn, dtype, length).view(rows, width)
        total[0, : 2 * turn] = 0.0
        expected = ReferenceKernels().add_rms_norm(
            total, expected_residual, weight, EPS, before,
        )  # fmt: skip
        out = rank.sum_norm(x, residual, weight, before)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        same = functools.partial(torch.allclose, rtol=tolerance, atol=tolerance)
        right.append(same(out, expected) and same(residual, expected_residual))
        if turn % 2:
            x = _brought(rank.rank, turn, dtype, 70)
            rank.collect(x, x, True)
            right.append(torch.equal(x, _summed(rank.size, turn, dtype, 70)))
    return right


def read_late() -> None:
    """This process has met the others, and has their data, long before it reads it."""
    barriers = itertools.count()
    receive = vars(sum_norm_module)["_receive"]

    def barrier(*_: object) -> None:
        if next(barriers) % 2:  # the one at the end of a meeting
            time.sleep(_LATE_S)

    def received(*arguments: Any) -> Any:
        time.sleep(_LATE_S)
        return receive(*arguments)

    InterpreterBuilder.create_barrier = barrier
    vars(sum_norm_module)["_receive"] = received


def _run_rank(
    work: Callable[[Rank], list[bool]], ranks: Ranks, rank: int, late: bool, results: Any
) -> None:
    torch.set_num_threads(1)
    if late:
        read_late()
    results.put((rank, work(Rank(ranks, rank))))


def run_ranks(work: Callable[[Rank], list[bool]], ranks: Ranks, late: int | None = None) -> None:
    """late: the rank that reads late."""
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [
        context.Process(target=_run_rank, args=(work, ranks, rank, rank == late, results))
        for rank in range(ranks.size)
    ]
    for process in processes:
        process.start()
    try:
        for _ in processes:
            _, right = results.get(timeout=60)
            assert right and all(right), right
    finally:
        for process in processes:
            process.kill()
            process.join()


WORK = [
    sums_and_gathers,
    functools.partial(sums_and_norms, dtype=torch.bfloat16),
    functools.partial(sums_and_norms, dtype=torch.float32),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("work", WORK)
@pytest.mark.parametrize(("size", "start"), [(2, 0), (3, 2**31 - 4)])
def test_ranks(work: Callable[[Rank], list[bool]], size: int, start: int) -> None:
    """start: of the count of collectives, which wraps round after 2**31."""
    run_ranks(work, Ranks(size, start, programs=4))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("work", WORK)
def test_who_reads_late_reads_what_was_brought(work: Callable[[Rank], list[bool]]) -> None:
    """The others are in the next collective by then, whose slabs and inboxes are not the same.

    One program, since the interpreter runs them in turns and the others' meetings would keep
    the ranks together.
    """
    run_ranks(work, Ranks(2, 0, programs=1), late=0)
