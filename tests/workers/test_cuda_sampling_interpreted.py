"""The GPU sampler in Triton's interpreter, on small vocabularies; tests/gpu runs it for real."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from .interpreted import use_interpreter

use_interpreter()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from albireo.workers.sampling.cuda import arithmetic, row_kernels, shards  # noqa: E402
from albireo.workers.sampling.cuda.sampler import MODES, VOCAB, CudaSampler  # noqa: E402
from albireo.workers.sampling.philox import token_words  # noqa: E402

from .cuda_sampling_checks import (  # noqa: E402
    InTurn,
    adversarial_rows,
    check_equal,
    random_params,
)
from .sampling_reference import Filters, params_of  # noqa: E402

# The interpreter's NumPy says what a GPU does silently.
pytestmark = pytest.mark.filterwarnings("ignore")


@triton.jit
def _words_and_noise(first, position, seed, words, noise, exact, GROUPED: tl.constexpr):
    lane = tl.arange(0, 64)
    seed_bits = tl.load(seed)
    word = arithmetic.tile_words(first, position, seed_bits, 64, GROUPED)
    tl.store(words + lane, word.to(tl.int64))
    tl.store(noise + lane, arithmetic.gumbel_bound(word))
    tl.store(exact + lane, arithmetic.exact_gumbel(word))


@pytest.mark.parametrize("grouped", [True, False])
def test_words_are_those_of_the_cpu(grouped: bool) -> None:
    seed, position, first = 0xDEADBEEF12345678, 123_456, 4_000
    expected = np.empty(64, np.uint32)
    token_words(np.uint64(seed), np.int64(position), np.int64(first), expected)
    words = torch.zeros(64, dtype=torch.int64)
    noise, exact = torch.zeros(64), torch.zeros(64, dtype=torch.float64)
    seed_bits = torch.from_numpy(np.array([seed], np.uint64).view(np.int64))
    at = torch.tensor(position, dtype=torch.int32)
    _words_and_noise[(1,)](first, int(at), seed_bits, words, noise, exact, GROUPED=grouped)
    assert words.tolist() == expected.tolist()
    gumbel = -np.log(-np.log((expected + 0.5) / 2.0**32))
    assert np.array_equal(exact.numpy(), gumbel)
    assert (noise.numpy() > gumbel - 2e-5).all()


@triton.jit
def _noise_of(words, noise):
    lane = tl.arange(0, 1024)
    word = tl.load(words + lane).to(tl.uint32)
    tl.store(noise + lane, arithmetic.gumbel_bound(word))


def test_the_bound_of_the_noise_holds_and_is_close_where_tokens_win() -> None:
    ends = np.concatenate([np.arange(256), np.geomspace(1, 2**31, 256).astype(np.int64)])
    words = np.concatenate([ends, 2**32 - 1 - ends])
    noise = torch.zeros(1024)
    _noise_of[(1,)](torch.from_numpy(words), noise)
    u = (words + 0.5) / 2.0**32
    over = noise.numpy() + np.log(-np.log(u))
    assert over.min() > -2e-5
    wins = u > 0.9
    assert wins.sum() > 50 and over[wins].max() < 0.065


@pytest.mark.parametrize("size", [3, 512, 1301])
def test_every_combination_of_filters(size: int) -> None:
    random = np.random.default_rng(size)
    logits = random.normal(0, 3, (22, size))
    check_equal(logits, random_params(random, 22), "cpu")


def test_bfloat16_logits_have_many_ties() -> None:
    random = np.random.default_rng(5)
    logits = random.normal(0, 3, (19, 1500))
    check_equal(logits, random_params(random, 19), "cpu", torch.bfloat16)


@pytest.mark.parametrize(
    "by",
    [
        Filters(temperature=0.0),
        Filters(temperature=1e-45),
        Filters(top_k=9),
        Filters(top_p=0.7),
        Filters(top_k=700, top_p=0.9, min_p=0.01, temperature=2.0),
    ],
    ids=str,
)
def test_adversarial_rows(by: Filters) -> None:
    random = np.random.default_rng(6)
    check_equal(adversarial_rows(random, 900), params_of(*[by] * 12), "cpu")


@pytest.mark.parametrize("room", [4, 64])
def test_rows_with_more_candidates_than_room_are_searched_whole(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(row_kernels, "_ROOM", room)
    monkeypatch.setattr(row_kernels, "_SEARCH_BLOCK", 512)
    random = np.random.default_rng(7)
    logits = np.round(random.normal(0, 3, (18, 700)) * 4) / 4
    check_equal(logits, random_params(random, 18), "cpu")


@pytest.mark.parametrize("buckets", [2, 16])
def test_the_number_of_buckets_does_not_show(buckets: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_kernels, "_BUCKETS", buckets)
    random = np.random.default_rng(8)
    check_equal(random.normal(0, 2, (18, 800)), random_params(random, 18), "cpu")


@pytest.mark.parametrize(
    ("mode", "ranks", "full", "filtered"),
    [
        ("gather", 3, False, False),
        ("gather", 2, True, True),
        ("sequence", 3, True, False),
        ("sequence", 2, True, True),
        ("vocab", 3, False, False),
        ("vocab", 3, True, False),
    ],
)
def test_ranks_agree_with_the_cpu(mode: str, ranks: int, full: bool, filtered: bool) -> None:
    random = np.random.default_rng(9)
    size = 6 * 107
    logits = np.concatenate([random.normal(0, 3, (5, size)), adversarial_rows(random, size)[4:8]])
    params = random_params(random, len(logits), vary=filtered)
    if not full:
        params.temperature[:] = 0
    check_equal(logits, params, "cpu", ranks=ranks, full=full, filtered=filtered, mode=mode)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_ranks_without_peer_memory_agree_with_the_cpu(mode: str, full: bool) -> None:
    random = np.random.default_rng(13)
    logits = np.concatenate([random.normal(0, 3, (4, 300)), adversarial_rows(random, 300)[4:8]])
    params = random_params(random, len(logits))
    if not full:
        params.temperature[:] = 0
    for dtype in (torch.float32, torch.bfloat16):
        check_equal(
            logits, params, "cpu", dtype, ranks=2, full=full, filtered=full, mode=mode, peers=False
        )


@pytest.mark.parametrize("peers", [True, False])
def test_candidates_decide_rows_and_the_others_are_sampled_whole(
    peers: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Many small tiles, so that shards have something to choose from."""
    for module in (row_kernels, shards):
        monkeypatch.setattr(module, "TILE", 32)
        monkeypatch.setattr(module, "_ROOM", 128)
    monkeypatch.setattr(row_kernels, "LINE", 32)
    monkeypatch.setattr(row_kernels, "_BUCKETS", 64)
    monkeypatch.setattr(shards, "MAX_CANDIDATES", 16)
    random = np.random.default_rng(12)
    size = 2 * 448
    logits = random.normal(0, 3, (10, size))
    logits[8] = np.round(logits[8])
    logits[9, 448:] = -np.inf
    by = [
        Filters(top_k=5, top_p=0.9, min_p=0.01), Filters(top_k=9), Filters(top_p=0.5),
        Filters(min_p=0.3), Filters(), Filters(temperature=0.0),
        Filters(top_p=0.999), Filters(top_k=200, top_p=0.5), Filters(top_k=4), Filters(top_k=3),
    ]  # fmt: skip
    left: list[int] = []
    params = params_of(*by[::-1], seeds=list(range(10)))
    check_equal(logits, params, "cpu", ranks=2, left=left, peers=peers)
    # The nucleus and the 200 best are more than 16 a shard; ties may be.
    assert left in ([2, 2], [3, 3])


@pytest.mark.parametrize("count", [1, 2, 3])
def test_fewer_rows_than_ranks(count: int) -> None:
    random = np.random.default_rng(10)
    params = params_of(*[Filters(top_p=0.9, temperature=0.8)] * count)
    check_equal(random.normal(0, 3, (count, 90)), params, "cpu", ranks=3)


def test_auto_goes_by_the_times_of_rank_0() -> None:
    """Each rank's clock says something else; all take rank 0's fastest, by kind and rows."""
    chosen: dict[int, list[str]] = {}
    kinds = ((False, False), (True, False), (True, True))

    def work(communicator: Any) -> None:
        rank = communicator.rank
        sampler = CudaSampler(32, 64, rank * 32, communicator, "cpu")
        assert sampler.mode_for(32, True, True) == VOCAB
        calls = itertools.count()

        def time_us(call: Callable[[], None]) -> float:
            """Of the case and the mode whose turn it is: on rank 0 another mode each time."""
            case, mode = divmod(next(calls), 3)
            return 2.0 - (mode == (case % 3 if rank == 0 else 0))

        times = sampler.tune(time_us)
        assert len(times) == 9
        assert times["greedy, 8 rows"] == {"gather": 2.0, "sequence": 1.0, "vocab": 2.0}
        chosen[rank] = [sampler.mode_for(rows, *kind) for kind in kinds for rows in (1, 7, 32)]

    InTurn(2, "cpu").run(work)
    assert chosen[0] == chosen[1] == list(MODES) * 3


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no sampling mode 'best'"):
        CudaSampler(1, 64, 0, None, "cpu", "best")
