"""Which way a sum over GPUs goes, without a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from .interpreted import use_interpreter

use_interpreter()

from albireo.workers.engine.cuda.graphs import captured_sizes  # noqa: E402
from albireo.workers.parallel import cuda  # noqa: E402
from albireo.workers.parallel.cuda import (  # noqa: E402
    APART,
    FUSIONS,
    NCCL,
    ONE_SHOT,
    TOGETHER,
    TWO_SHOT,
    CudaCommunicator,
    GroupNotFormed,
    fastest_sums,
)
from albireo.workers.parallel.one_shot import block_of  # noqa: E402
from albireo.workers.parallel.sum_bytes import PIECES_BYTES, SLAB_BYTES  # noqa: E402
from albireo.workers.sampling.cuda.candidates import MESSAGE_WORDS  # noqa: E402
from albireo.workers.sampling.cuda.draw import WINNER_WORDS  # noqa: E402


class Summed:
    """In place of the symmetric memory: the sizes that our kernel was asked for."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def launch(self, x: torch.Tensor, out: torch.Tensor, reduce: bool) -> None:
        assert reduce and out is x
        x.mul_(2)
        self.sizes.append(x.nbytes)


def communicator(tuned: bool) -> tuple[CudaCommunicator, Summed]:
    """tuned: with tables in which every way is somewhere the fastest."""
    made: Any = object.__new__(CudaCommunicator)
    made._method_by_bits = (ONE_SHOT,) * 5 + (TWO_SHOT,) * 6 if tuned else ()
    made._fusion_by_bits = FUSIONS * 5 if tuned else ()
    made._symmetric = summed = Summed()
    return made, summed


def test_the_fastest_way_depends_on_the_size() -> None:
    made, _ = communicator(tuned=True)
    sizes = (1 << 13, SLAB_BYTES, SLAB_BYTES + 1)
    assert [made.method_for(nbytes) for nbytes in sizes] == [ONE_SHOT, TWO_SHOT, NCCL]
    assert {made.fusion_for(rows, 64) for rows in (1, 2)} == {APART, TOGETHER}


def test_our_kernel_sums_what_is_a_little_larger_in_pieces_where_it_is_the_fastest() -> None:
    made, summed = communicator(tuned=True)
    made._method_by_bits = (ONE_SHOT,) * 11
    assert [made.method_for(nbytes) for nbytes in (PIECES_BYTES, PIECES_BYTES + 2)] == [
        ONE_SHOT,
        NCCL,
    ]
    x = torch.ones(PIECES_BYTES // 2 - 8, dtype=torch.bfloat16)
    made.all_reduce(x)
    assert (x == 2).all()
    assert summed.sizes == [SLAB_BYTES, SLAB_BYTES - 16]


@pytest.mark.parametrize("methods", [(), (NCCL,) * 11], ids=["untuned", "tuned"])
def test_where_gpus_do_not_map_each_other_all_goes_through_nccl(
    methods: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, _ = communicator(tuned=False)
    made._symmetric, made._method_by_bits = None, methods
    assert not made.has_peer_memory
    asked: list[tuple[str, int]] = []
    monkeypatch.setattr(dist, "all_reduce", lambda x: asked.append(("sum", x.nbytes)))
    monkeypatch.setattr(
        dist, "all_gather_into_tensor", lambda out, x: asked.append(("gather", x.nbytes))
    )
    x = torch.ones(4, 8, dtype=torch.bfloat16)
    made.all_reduce(x)
    assert made.sum_norm(x, x, torch.ones(8), 1e-6) is None and made.fusion_for(4, 64) == APART
    made.all_gather(torch.zeros(3, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int32))
    assert asked == [("sum", 64), ("gather", 12)]


@pytest.mark.parametrize(
    ("reachable", "variable", "others", "expected"),
    [(True, None, 1, True), (False, None, 1, False), (True, "1", 1, False), (True, None, 0, False)],
)
def test_peers_are_used_where_all_ranks_can(
    reachable: bool, variable: str | None, others: int, expected: bool,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """others: what the least able of the other ranks has found."""
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    if variable is not None:
        monkeypatch.setenv("NCCL_P2P_DISABLE", variable)
    asked: list[Any] = []

    def can(device: torch.device, peer: int) -> bool:
        asked.append(peer)
        return reachable

    monkeypatch.setattr(torch.cuda, "can_device_access_peer", can)
    monkeypatch.setattr(dist, "all_reduce", lambda x, op: x.clamp_(max=others))
    assert cuda._all_map(torch.device("cpu", 0), 3) == expected
    assert asked == ([] if variable else [1, 2] if reachable else [1])
    assert ("slower" in caplog.text) != expected


def test_sums_that_are_not_tuned_all_go_one_way() -> None:
    made, summed = communicator(tuned=False)
    for rows in (0, 1, 512, 2500):
        x = torch.ones(rows, 4096, dtype=torch.bfloat16)
        summed.sizes.clear()
        made.all_reduce(x)
        assert (x == 2).all()
        assert sum(summed.sizes) == x.nbytes and max(summed.sizes, default=0) <= SLAB_BYTES
        assert made.fusion_for(rows, x.nbytes) == APART


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_a_batch_invariant_group_is_not_tuned(
    batch_invariant: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Mock(has_peer_memory=False, size=2)
    monkeypatch.setattr(cuda, "CudaCommunicator", Mock(return_value=made))
    engine = Mock(tp=2, dtype="bfloat16", step_timeout_s=1.0, batch_invariant=batch_invariant)
    found = cuda.create_communicator(Mock(engine=engine), {}, torch.device("cpu"), 64)
    assert found is made and made.tune.called != batch_invariant


def test_more_than_two_ranks_are_not_batch_invariant_by_nccl(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made = Mock(has_peer_memory=False, size=4)
    monkeypatch.setattr(cuda, "CudaCommunicator", Mock(return_value=made))
    engine = Mock(tp=4, dtype="bfloat16", step_timeout_s=1.0, batch_invariant=True)
    with pytest.raises(GroupNotFormed, match="not to be had on 4 ranks"):
        cuda.create_communicator(Mock(engine=engine), {}, torch.device("cpu"), 64)


def test_ranks_that_come_late_share_one_deadline(tmp_path: Path) -> None:
    store = str(tmp_path / "store")

    def arrive() -> None:
        for peer in (1, 2):
            time.sleep(0.3)
            dist.FileStore(store, 4).set(cuda._ARRIVED.format(peer), "")

    late = threading.Thread(target=arrive)
    late.start()
    began = time.monotonic()
    with pytest.raises(GroupNotFormed, match=r"rank 0 of 4 waited 1 s .* for rank 3: "):
        cuda._meet(store, 0, 4, 1.0)
    took_s = time.monotonic() - began
    late.join()
    # The store counts whole seconds.  A second of its own for each would be 0.3 + 0.3 + 2.
    assert took_s < 2.3


@pytest.mark.parametrize("words", [WINNER_WORDS, MESSAGE_WORDS])
def test_any_rows_that_are_sampled_exchange_by_a_kernel_of_captured_sizes(words: int) -> None:
    """Triton has one for each constant, for multiples of 16, and for 1."""

    def kernels(sizes: Iterable[int]) -> set[tuple[int, bool]]:
        return {(block_of(rows * words), rows * words % 16 == 0) for rows in sizes}

    assert kernels(range(1, 257)) <= kernels(captured_sizes(256))


def test_the_fastest_sum_of_each_size() -> None:
    """Rows of 8 KiB: with the norm where that is faster, between two sizes of a sum too."""
    sums = {
        8 << 10: {ONE_SHOT: 8.0, TWO_SHOT: 10.0, NCCL: 7.0},
        16 << 10: {ONE_SHOT: 9.0, TWO_SHOT: 10.0, NCCL: 9.5},
        32 << 10: {ONE_SHOT: 14.0, TWO_SHOT: 13.0, NCCL: 20.0},
        64 << 10: {ONE_SHOT: 24.0, TWO_SHOT: 23.0, NCCL: 22.0},
    }
    norms = {1: {APART: 9.0, TOGETHER: 3.4}, 2: {APART: 9.0, TOGETHER: 30.0}}
    assert fastest_sums(sums, norms, 8 << 10) == {
        8 << 10: 3.4, 16 << 10: 9.0, 32 << 10: 13.0, 64 << 10: 22.0
    }  # fmt: skip
    assert fastest_sums(sums, {1: {APART: 9.0, TOGETHER: 50.0}}, 12 << 10)[12 << 10] == 8.0
    assert fastest_sums(sums, {}, 8 << 10)[8 << 10] == 7.0
