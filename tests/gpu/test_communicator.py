"""Collectives of two real GPUs: sums, gathers, in graphs, and a rank that does not come."""

from __future__ import annotations

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

pytest.importorskip("triton")
import torch
import torch.distributed as dist

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from albireo.workers.kernels.cuda.norm import rms_norm
from albireo.workers.parallel.cuda import (
    FUSIONS,
    METHODS,
    NCCL,
    ONE_SHOT,
    TOGETHER,
    CudaCommunicator,
    GroupNotFormed,
)
from albireo.workers.parallel.graph_time import graph_us
from albireo.workers.parallel.sum_bytes import SLAB_BYTES
from albireo.workers.sampling.cuda.sampler import MODES, CudaSampler

from ..workers.cuda_sampling_checks import random_params, tables_of
from ..workers.sampling_reference import draw, rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.alone,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SIZE = 2
DEADLINE_S = 150.0


def brought(rank: int, length: int, dtype: torch.dtype, turn: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    return torch.randn(length, generator=generator).to(dtype)


def summed(length: int, dtype: torch.dtype, turn: int) -> torch.Tensor:
    return sum(brought(r, length, dtype, turn).float() for r in range(SIZE)).to(dtype)  # type: ignore


def sums_of_all_methods(communicator: CudaCommunicator, device: torch.device) -> None:
    turn = 0
    for method in METHODS:
        communicator.method_for = lambda nbytes, method=method: method  # type: ignore
        for dtype in (torch.bfloat16, torch.float32):
            for length in (8, 96, 4096, 32 * 4096, 130 * 5120):
                turn += 1
                x = brought(communicator.rank, length, dtype, turn).to(device)
                communicator.all_reduce(x)
                expected = summed(length, dtype, turn)
                assert torch.equal(x.cpu(), expected), (method, dtype, length)


def sums_in_graphs(communicator: CudaCommunicator, device: torch.device) -> None:
    """What a decode step does: many sums of changing sizes, replayed with new data."""
    communicator.tune(4096)
    lengths = [4096, 64 * 4096, 8, 256 * 4096, 3 * SLAB_BYTES // 4, 4096] * 4
    xs = [torch.zeros(n, dtype=torch.bfloat16, device=device) for n in lengths]
    mine = torch.zeros(7, 4, dtype=torch.int32, device=device)
    gathered = torch.zeros(SIZE, 7, 4, dtype=torch.int32, device=device)

    def step() -> None:
        for x in xs:
            communicator.all_reduce(x)
        communicator.all_gather(mine, gathered)

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
        for replay in range(20):
            for n, x in enumerate(xs):
                x.copy_(brought(communicator.rank, len(x), x.dtype, replay * 100 + n))
            mine.fill_(10 * replay + communicator.rank)
            graph.replay()
            for n, x in enumerate(xs):
                assert torch.equal(x.cpu(), summed(len(x), x.dtype, replay * 100 + n)), (replay, n)
            assert gathered[:, 0, 0].tolist() == [10 * replay + r for r in range(SIZE)]


class SummedAndNormed(NamedTuple):
    """What one of them has left, and what it was made of.  place: replay, rows."""

    place: tuple[int, int]
    residual: torch.Tensor
    out: torch.Tensor
    total: torch.Tensor
    added: torch.Tensor


def summed_and_normed(
    communicator: CudaCommunicator,
    device: torch.device,
    width: int,
    turns: list[int],
    replays: int,
    run: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor | None],
) -> Iterator[tuple[int, SummedAndNormed]]:
    """In a graph, one after the other as in a step: the kernels come up beside each other.

    turns: rows of each.  run(number, x, residual): one of them.  Yields each replay's, numbered.
    """
    xs = [torch.zeros(r, width, dtype=torch.bfloat16, device=device) for r in turns]
    residuals = [torch.zeros_like(x) for x in xs]
    outs: list[torch.Tensor] = []

    def step() -> None:
        outs.clear()
        for n, (x, residual) in enumerate(zip(xs, residuals, strict=True)):
            out = run(n, x, residual)
            assert out is not None
            outs.append(out)

    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        step()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            step()
        for replay in range(replays):
            for n, x in enumerate(xs):
                turn = replay * 100 + n
                x.copy_(brought(communicator.rank, x.numel(), x.dtype, turn).view_as(x))
                x[0, : 2 * n] = -0.0
                residuals[n].copy_(brought(77, x.numel(), x.dtype, turn).view_as(x))
            graph.replay()
            for n, (x, residual, out) in enumerate(zip(xs, residuals, outs, strict=True)):
                turn = replay * 100 + n
                added = brought(77, x.numel(), x.dtype, turn).view_as(x).to(device)
                total = summed(x.numel(), x.dtype, turn).view_as(x).to(device)
                total[0, : 2 * n] = 0.0
                yield n, SummedAndNormed((replay, turns[n]), residual, out, total, added)


def sums_with_norms(communicator: CudaCommunicator, device: torch.device) -> None:
    """Every other one fetches weights of an odd shape beside it."""
    ahead = torch.zeros(3001, 4104, dtype=torch.bfloat16, device=device)
    width, turns = 4096, [1, 3, 32, 70, 256, 300, 512, 2] * 3
    communicator.tune(width)
    communicator.fusion_for = lambda *_: TOGETHER  # type: ignore[method-assign]
    weight = torch.rand(width, device=device) + 0.5
    dist.broadcast(weight, 0)

    def run(n: int, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        next_weight = ahead if n % 2 else None
        return communicator.sum_norm(x, residual, weight, 1e-6, ahead=next_weight)

    for _, found in summed_and_normed(communicator, device, width, turns, 5, run):
        normed = rms_norm(found.total, found.added, weight, 1e-6)
        assert torch.equal(found.residual, found.added), found.place
        assert torch.equal(found.out, normed), found.place


def sums_with_two_norms(communicator: CudaCommunicator, device: torch.device) -> None:
    """As Gemma does it: the sum is normalised before it is added.  Rows are no power of two wide.

    Every fourth has no norm before, as a kernel of its own between.  A row's squares may be
    added in another order than by two kernels, which may round a value to its neighbour; few.
    """
    width, turns = 3840, [1, 3, 32, 70, 256, 300, 2, 512] * 2
    communicator.tune(width)
    communicator.fusion_for = lambda *_: TOGETHER  # type: ignore[method-assign]
    weight, inner = torch.rand(width, device=device) + 0.5, torch.rand(width, device=device) - 0.5
    for each in (weight, inner):
        dist.broadcast(each, 0)
    inners = [None if n % 4 == 3 else inner for n in range(len(turns))]

    def run(n: int, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor | None:
        return communicator.sum_norm(x, residual, weight, 1e-6, inners[n])

    for n, found in summed_and_normed(communicator, device, width, turns, 3, run):
        normed = rms_norm(found.total, found.added, weight, 1e-6, inners[n])
        for got, wanted in ((found.residual, found.added), (found.out, normed)):
            torch.testing.assert_close(got, wanted, rtol=2**-7, atol=2**-5)
            others = int((got != wanted).sum())
            assert others <= 1e-3 * got.numel(), (found.place, others)


def tunes(communicator: CudaCommunicator, device: torch.device) -> None:
    sums, norms = communicator.tune(1024)
    assert set(norms) == {2**bits for bits in range(12)} and set(norms[1024]) == set(FUSIONS)
    assert all(time > 0 for each in (*sums.values(), *norms.values()) for time in each.values())


def samples_in_every_mode(communicator: CudaCommunicator, device: torch.device) -> None:
    """The CPU's tokens, in graphs that follow each other as steps do, at times with a rank late."""
    random = np.random.default_rng(3)
    count, vocab = 37, 32_000
    width, rank = vocab // SIZE, communicator.rank
    params = random_params(random, count)
    tables = tables_of(params, str(device))
    slots = torch.arange(count, dtype=torch.int32, device=device)
    positions = torch.zeros(count, dtype=torch.int32, device=device)
    logits = torch.zeros(count, width, device=device)
    out = torch.zeros(count, dtype=torch.int32, device=device)
    samplers = {
        mode: CudaSampler(count, vocab, rank * width, communicator, device, mode) for mode in MODES
    }
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        graphs = {}
        for mode, sampler in samplers.items():
            sampler.sample(logits, slots, tables, positions, True, out)
            stream.synchronize()
            graphs[mode] = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graphs[mode], stream=stream, capture_error_mode="thread_local"):
                sampler.sample(logits, slots, tables, positions, True, out)
        for step in range(12):
            rows = random.normal(0, random.uniform(0.5, 4, (count, 1)), (count, vocab))
            rows = rows.astype(np.float32)
            at = np.arange(count) * 31 + step
            logits.copy_(torch.from_numpy(rows[:, rank * width : (rank + 1) * width]))
            positions.copy_(torch.from_numpy(at.astype(np.int32)))
            expected = draw(rows, rows_of(range(count), at), params)
            for mode, graph in graphs.items():
                if step % 4 == rank:
                    torch.cuda._sleep(1_000_000)
                out.fill_(-7)
                graph.replay()
                wrong = np.flatnonzero(out.cpu().numpy() != expected)
                assert not len(wrong), (step, mode, wrong)
    assert 0 < samplers["vocab"].undecided < 14 * count


def chooses_a_mode(communicator: CudaCommunicator, device: torch.device) -> None:
    """By rank 0's times: the same on every rank, and quickly."""
    sampler = CudaSampler(64, 4096, communicator.rank * 2048, communicator, device)
    times = sampler.tune(lambda work: graph_us(work, device))
    assert len(times) == 9 and all(0 < us < 1e5 for by in times.values() for us in by.values())
    chosen = [
        MODES.index(sampler.mode_for(rows, full, filtered))
        for rows in (1, 5, 64)
        for full, filtered in ((False, False), (True, False), (True, True))
    ]
    mine = torch.tensor(chosen, dtype=torch.int32, device=device)
    everyones = torch.zeros(SIZE, len(chosen), dtype=torch.int32, device=device)
    communicator.all_gather(mine, everyones)
    assert everyones[0].tolist() == everyones[1].tolist() == chosen


def one_is_late(communicator: CudaCommunicator, device: torch.device) -> None:
    """A rank far ahead of the other must wait before it writes to the same slab again."""
    communicator.method_for = lambda _: ONE_SHOT  # type: ignore[method-assign]
    length, dtype = 64 * 4096, torch.bfloat16
    xs = [brought(communicator.rank, length, dtype, turn).to(device) for turn in range(60)]
    torch.cuda.synchronize(device)
    for turn, x in enumerate(xs):
        # Of six sums three in a row come late on one rank, then three on the other.
        if turn // 3 % SIZE == communicator.rank:
            torch.cuda._sleep(400_000)
        communicator.all_reduce(x)
    for turn, x in enumerate(xs):
        assert torch.equal(x.cpu(), summed(length, dtype, turn)), turn


def sums_untuned(communicator: CudaCommunicator, device: torch.device) -> None:
    """As with --batch-invariant: every size one way, what is larger than a slab in pieces."""
    for length in (8, 4096, SLAB_BYTES // 2 + 8, 5 * SLAB_BYTES // 4):
        x = brought(communicator.rank, length, torch.bfloat16, length).to(device)
        assert communicator.method_for(x.nbytes) == ONE_SHOT
        communicator.all_reduce(x)
        assert torch.equal(x.cpu(), summed(length, x.dtype, length)), length


def all_goes_through_nccl(communicator: CudaCommunicator, device: torch.device) -> None:
    assert not communicator.has_peer_memory
    sums, norms = communicator.tune(1024)
    assert {tuple(by) for by in sums.values()} == {(NCCL,)} and not norms
    x = torch.zeros(2, 1024, dtype=torch.bfloat16, device=device)
    assert communicator.sum_norm(x, x, torch.ones(1024, device=device), 1e-6) is None


ROUNDS = [
    sums_untuned, sums_of_all_methods, sums_in_graphs, sums_with_norms, sums_with_two_norms, tunes,
    samples_in_every_mode, chooses_a_mode, one_is_late,
]  # fmt: skip
APART_ROUNDS = [all_goes_through_nccl, sums_in_graphs, samples_in_every_mode, chooses_a_mode]
"""Of GPUs that do not map each other's memory."""
Outcome = tuple[int, str, str | None]
"""(rank, round, what failed)"""


def _run_rank(path: str, rank: int, peers: bool, results: Any) -> None:
    """All rounds in one process, up to the first that fails: the ranks would be out of step."""
    name = "the meeting"
    if not peers:
        os.environ["NCCL_P2P_DISABLE"] = "1"
    try:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        communicator = CudaCommunicator(path, rank, SIZE, device, 60.0)
        for work in ROUNDS if peers else APART_ROUNDS:
            name = work.__name__
            work(communicator, device)
            torch.cuda.synchronize(device)
            for replaced in ("method_for", "fusion_for"):
                vars(communicator).pop(replaced, None)
            results.put((rank, name, None))
    except BaseException:
        results.put((rank, name, traceback.format_exc()))


def _outcomes(path: str, peers: bool) -> list[Outcome]:
    """Of both ranks, up to the first failure."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [
        context.Process(target=_run_rank, args=(path, rank, peers, results), daemon=True)
        for rank in range(SIZE)
    ]
    for process in ranks:
        process.start()
    found: list[Outcome] = []
    try:
        rounds = len(ROUNDS if peers else APART_ROUNDS)
        while len(found) < SIZE * rounds and all(failure is None for *_, failure in found):
            found.append(results.get(timeout=DEADLINE_S))
    except queue.Empty:
        found.append((-1, "any round", f"no rank has reported for {DEADLINE_S:g} s"))
    finally:
        for process in ranks:
            process.kill()
            process.join()
    return found


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return _outcomes(str(tmp_path_factory.mktemp("ranks") / "store"), True)


@pytest.fixture(scope="module")
def outcomes_apart(tmp_path_factory: pytest.TempPathFactory) -> list[Outcome]:
    return _outcomes(str(tmp_path_factory.mktemp("apart") / "store"), False)


@pytest.mark.parametrize("work", ROUNDS)
def test_two_gpus(work: Callable[..., None], outcomes: list[Outcome]) -> None:
    _check(work, outcomes)


@pytest.mark.parametrize("work", APART_ROUNDS)
def test_two_gpus_that_do_not_map_each_other(
    work: Callable[..., None], outcomes_apart: list[Outcome]
) -> None:
    _check(work, outcomes_apart)


def _check(work: Callable[..., None], outcomes: list[Outcome]) -> None:
    passed = [rank for rank, name, failure in outcomes if name == work.__name__ and failure is None]
    failures = [f"rank {rank}, {name}: {why}" for rank, name, why in outcomes if why is not None]
    assert sorted(passed) == list(range(SIZE)), failures


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    device = torch.device("cuda", 0)
    with pytest.raises(GroupNotFormed, match=r"for rank 1\b"):
        CudaCommunicator(str(tmp_path / "store"), 0, SIZE, device, 0.5)
