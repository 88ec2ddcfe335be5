"""The GPU sampler at full vocabulary against the CPU's, in graphs, and how often it draws what."""

from __future__ import annotations

import math

import numpy as np
import pytest

pytest.importorskip("triton")
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)

from albireo.workers.sampling.cuda import CudaSampler
from albireo.workers.sampling.cuda.sampler import MODES

from ..workers.cuda_edit_checks import Story
from ..workers.cuda_logprob_checks import check as check_logprobs
from ..workers.cuda_sampling_checks import (
    adversarial_rows,
    check_equal,
    random_params,
    tables_of,
)
from ..workers.sampling_reference import (
    Filters,
    draw,
    params_of,
    reference_kept,
    rows_of,
)

pytestmark = pytest.mark.gpu

VOCAB = 151_936
DTYPES = [
    pytest.param(torch.float32, id="float32"),
    pytest.param(torch.bfloat16, id="bfloat16"),
]


def real_looking(random: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """Logits of all kinds of models: a broad bulk, a few tokens far ahead."""
    logits = random.normal(0, random.uniform(0.3, 3.0, (rows, 1)), (rows, vocab))
    logits[:, random.integers(vocab, size=40)] += random.exponential(5, (rows, 40))
    return logits.astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("vocab", [VOCAB, 262_208, 128_256, 49_152, 32_003])
def test_tokens_are_those_of_the_cpu(vocab: int, dtype: torch.dtype) -> None:
    random = np.random.default_rng(vocab)
    check_equal(real_looking(random, 40, vocab), random_params(random, 40), "cuda", dtype)


@pytest.mark.parametrize(
    "by",
    [
        Filters(temperature=0.0),
        Filters(),
        Filters(temperature=1e-45),
        Filters(top_k=50, top_p=0.95, min_p=0.02, temperature=0.8),
        Filters(top_p=0.9),
        Filters(top_k=5000, top_p=0.99),
    ],
    ids=str,
)
def test_adversarial_rows(by: Filters) -> None:
    random = np.random.default_rng(1)
    check_equal(adversarial_rows(random, VOCAB), params_of(*[by] * 12), "cuda")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(("full", "filtered"), [(False, False), (True, False), (True, True)])
def test_ranks_agree_with_the_cpu(mode: str, ranks: int, full: bool, filtered: bool) -> None:
    random = np.random.default_rng(2)
    logits = real_looking(random, 21, VOCAB)
    params = random_params(random, 21, vary=filtered)
    if not full:
        params.temperature[:] = 0
    check_equal(logits, params, "cuda", ranks=ranks, full=full, filtered=filtered, mode=mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("full", "filtered"), [(False, False), (True, True)])
def test_ranks_without_peer_memory_agree_with_the_cpu(
    mode: str, full: bool, filtered: bool
) -> None:
    random = np.random.default_rng(14)
    params = random_params(random, 21, vary=filtered)
    if not full:
        params.temperature[:] = 0
    logits = real_looking(random, 21, VOCAB)
    check_equal(
        logits, params, "cuda", ranks=2, full=full, filtered=filtered, mode=mode, peers=False
    )


def test_many_draws_of_one_row_are_those_of_the_cpu() -> None:
    """Only float32 preselection could differ, in near ties: none in 20,000 draws."""
    random = np.random.default_rng(3)
    row, count = real_looking(random, 1, 32_000), 250
    params = params_of(Filters(), Filters(temperature=0.3), seeds=[11, 12])
    tables = tables_of(params, "cuda")
    sampler = CudaSampler(count, 32_000, 0)
    logits = torch.from_numpy(row).cuda().expand(count, -1).contiguous()
    out = torch.empty(count, dtype=torch.int32, device="cuda")
    for slot in range(2):
        slots = torch.full((count,), slot, dtype=torch.int32, device="cuda")
        for first in range(0, 10_000, count):
            positions = np.arange(first, first + count)
            on_device = torch.from_numpy(positions.astype(np.int32)).cuda()
            sampler.sample(logits, slots, tables, on_device, True, out, filtered=False)
            expected = draw(np.tile(row, (count, 1)), rows_of([slot] * count, positions), params)
            assert np.array_equal(out.cpu().numpy(), expected)


def test_a_graph_samples_what_its_buffers_hold_at_replay() -> None:
    random = np.random.default_rng(4)
    count = 24
    params = random_params(random, count)
    tables = tables_of(params, "cuda")
    sampler = CudaSampler(count, VOCAB, 0)
    logits = torch.zeros(count, VOCAB, device="cuda")
    slots = torch.arange(count, dtype=torch.int32, device="cuda")
    positions = torch.zeros(count, dtype=torch.int32, device="cuda")
    out = torch.empty(count, dtype=torch.int32, device="cuda")
    given = (logits, slots, tables, positions, True, out)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        sampler.sample(*given)
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            sampler.sample(*given)
    torch.cuda.synchronize()
    for step in range(4):
        rows = real_looking(random, count, VOCAB)
        at = np.arange(count) * 31 + step
        logits.copy_(torch.from_numpy(rows))
        positions.copy_(torch.from_numpy(at.astype(np.int32)))
        graph.replay()
        expected = draw(rows, rows_of(range(count), at), params)
        assert np.array_equal(out.cpu().numpy(), expected)


@pytest.mark.parametrize(
    "by",
    [
        Filters(),
        Filters(top_k=10),
        Filters(top_p=0.8),
        Filters(temperature=1.5, top_k=40, top_p=0.9, min_p=0.01),
    ],
    ids=str,
)
def test_draws_follow_the_softmax_over_what_is_kept(by: Filters) -> None:
    batch, batches = 4096, 50
    row = np.random.default_rng(5).normal(0, 2, 100).astype(np.float32)
    sampler = CudaSampler(batch, 100, 0)
    logits = torch.from_numpy(row).cuda().expand(batch, -1).contiguous()
    slots = torch.zeros(batch, dtype=torch.int32, device="cuda")
    tables = tables_of(params_of(by, seeds=[77]), "cuda")
    out = torch.empty(batch, dtype=torch.int32, device="cuda")
    counts = torch.zeros(100, dtype=torch.int64, device="cuda")
    for step in range(batches):
        positions = torch.arange(batch, dtype=torch.int32, device="cuda") + step * batch
        sampler.sample(logits, slots, tables, positions, True, out)
        counts += torch.bincount(out, minlength=100)
    kept = np.isin(np.arange(100), list(reference_kept(row, by)))
    weights = np.where(kept, np.exp(row.astype(np.float64) / by.temperature), 0.0)
    expected = weights / weights.sum() * batch * batches
    observed = counts.cpu().numpy()
    assert not observed[~kept].any()
    often = expected >= 10
    pairs = [(observed[often], expected[often])]
    if expected[~often].sum() >= 10:
        pairs.append((observed[~often].sum(keepdims=True), expected[~often].sum(keepdims=True)))
    statistic = sum(float(((o - e) ** 2 / e).sum()) for o, e in pairs)
    freedom = sum(len(o) for o, _ in pairs) - 1
    # Wilson and Hilferty: p > 0.001.
    spread = 2 / (9 * freedom)
    assert ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread) < 3.09


@pytest.mark.parametrize(("rank", "ranks"), [(0, 1), (1, 2), (2, 3)])
def test_edited_logits_are_those_of_a_plain_list(rank: int, ranks: int) -> None:
    """Penalties, biases, bans, masks; few rows of the whole vocabulary."""
    story = Story(rank, VOCAB - VOCAB % ranks, "cuda", rank, ranks)
    for _ in range(40):
        story.step()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("scores", [False, True])
def test_logprobs_are_those_of_log_softmax(dtype: torch.dtype, ranks: int, scores: bool) -> None:
    check_logprobs(ranks, VOCAB, "cuda", dtype, ranks, scores, rows=24)
