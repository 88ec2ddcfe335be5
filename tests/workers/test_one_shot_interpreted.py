"""The one-launch collective in Triton's interpreter, between processes that share memory."""

from __future__ import annotations

import multiprocessing
from typing import Any

import pytest
import torch

from .interpreted import use_interpreter

use_interpreter()

from albireo.workers.parallel.one_shot import PROGRAMS, one_shot  # noqa: E402

SLAB_BYTES = 4096
TURNS = 4


def _brought(rank: int, turn: int, dtype: torch.dtype) -> torch.Tensor:
    length = 300 + 57 * (turn % 3)
    return torch.randn(length, generator=torch.Generator().manual_seed(10 * turn + rank)).to(dtype)


def _run_rank(
    rank: int, slabs: list[torch.Tensor], flags: list[torch.Tensor], start: int, results: Any
) -> None:
    torch.set_num_threads(1)
    size = len(slabs)
    slab_table = torch.tensor([slab.data_ptr() for slab in slabs])
    flag_table = torch.tensor([flag.data_ptr() for flag in flags])
    epochs = torch.full((PROGRAMS,), start, dtype=torch.int32)

    def launch(x: torch.Tensor, out: torch.Tensor, reduce: bool) -> None:
        one_shot[(PROGRAMS,)](
            x, out, slab_table, flag_table, epochs, x.numel(), SLAB_BYTES, rank,
            SIZE=size, BLOCK=64, REDUCE=reduce,
        )  # fmt: skip

    right = []
    for turn in range(TURNS):
        dtype = (torch.bfloat16, torch.float32)[turn % 2]
        x = _brought(rank, turn, dtype)
        launch(x, x, True)
        total = _brought(0, turn, dtype).float()
        for peer in range(1, size):
            total += _brought(peer, turn, dtype).float()
        right.append(torch.equal(x, total.to(dtype)))
        mine = torch.arange(10, dtype=torch.int32) + 100 * rank + turn
        out = torch.zeros(size, 10, dtype=torch.int32)
        launch(mine, out, False)
        expected = [torch.arange(10) + 100 * peer + turn for peer in range(size)]
        right.append(torch.equal(out, torch.stack(expected).int()))
    results.put((rank, right))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("size", "start"), [(2, 0), (3, 2**31 - 4)])
def test_sums_and_gathers(size: int, start: int) -> None:
    """start: of the count of collectives, which wraps round after 2**31."""
    slabs = [torch.zeros(2 * SLAB_BYTES, dtype=torch.uint8).share_memory_() for _ in range(size)]
    flags = [
        torch.full((PROGRAMS * size,), start, dtype=torch.int32).share_memory_()
        for _ in range(size)
    ]
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    ranks = [
        context.Process(target=_run_rank, args=(rank, slabs, flags, start, results))
        for rank in range(size)
    ]
    for process in ranks:
        process.start()
    try:
        for _ in ranks:
            _, right = results.get(timeout=60)
            assert right == [True] * (2 * TURNS)
    finally:
        for process in ranks:
            process.kill()
            process.join()
