"""The ways of a group to its tokens: the same tokens by all of them, on any number of ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from albireo.workers.parallel.communicator import HostCommunicator
from albireo.workers.sampling import candidates
from albireo.workers.sampling.draw import NOT_FINITE, NOTHING_ALLOWED
from albireo.workers.sampling.params import SampleRows, SlotParams
from albireo.workers.sampling.sampler import AUTO, GATHER, MODES, SEQUENCE, VOCAB, Sampler
from albireo.workers.sampling.vocab import VocabSampler

from .sampling_ranks import on_ranks
from .sampling_reference import COMBINATIONS, Filters, draw, params_of, reference_kept, rows_of

MIXTURE = [
    Filters(temperature=0.0),
    *COMBINATIONS,
    Filters(top_k=240),
    Filters(top_k=300, min_p=0.3),
    Filters(top_k=256, top_p=0.5, min_p=0.2),
    Filters(top_p=0.6, min_p=0.4),
    Filters(top_p=0.99, min_p=0.5),
]


_DRAWS = 15


def sample_on(
    size: int, mode: str, logits: torch.Tensor, rows: SampleRows, params: SlotParams
) -> list[list[int]]:
    """The tokens that each rank gets."""
    vocab_size = logits.shape[1]

    def work(communicator: HostCommunicator) -> list[int]:
        sampler = Sampler(vocab_size, len(params.seed), communicator, mode)
        shard = logits.chunk(size, dim=1)[communicator.rank]
        for _ in range(2):  # The second call finds used buffers.
            tokens = sampler.sample(shard, rows, params).tolist()
        return tokens

    return on_ranks(size, len(params.seed), vocab_size, work)


def rows_of_all_kinds(vocab_size: int) -> dict[str, np.ndarray]:
    """Logits [len(MIXTURE), V], the hard ones among them."""
    random = np.random.default_rng(3)
    shape = (len(MIXTURE), vocab_size)
    third = vocab_size // 3
    steep = random.normal(0, 4, shape)
    one_shard = np.full(shape, -np.inf)
    one_shard[:, third : 2 * third] = steep[:, third : 2 * third]
    one_token = np.full(shape, -np.inf)
    one_token[:, vocab_size - 1] = -3.0
    huge = steep.copy()
    huge[:, third + 5] = 3e38
    apart = steep.copy()
    apart[:, : 2 * third] -= 60.0
    return {
        "steep": steep,
        "flat": steep * 0.01,
        "all equal": np.zeros(shape),
        "few distinct values": np.round(steep),
        "one shard": one_shard,
        "one token": one_token,
        "one huge": huge,
        "best apart": apart,
        "both ends of float32": np.where(random.random(shape) < 0.5, 3.4e38, -3.4e38),
    }


@pytest.mark.parametrize("name", rows_of_all_kinds(30))
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_draws_the_same_tokens_on_any_number_of_ranks(mode: str, name: str) -> None:
    # Shards of 750 and 500 tokens: random words come in fours, blocks in 64s.
    logits = rows_of_all_kinds(1500)[name].astype(np.float32)
    logits = np.tile(logits, (_DRAWS, 1))
    slots = np.tile(np.arange(len(MIXTURE))[::-1], _DRAWS)
    params = params_of(*MIXTURE * _DRAWS, seeds=list(range(len(slots))))
    rows = rows_of(slots, np.arange(len(slots)) + 100)
    alone = draw(logits, rows, params).tolist()
    for size in (1, 2, 3):
        for tokens in sample_on(size, mode, torch.from_numpy(logits), rows, params):
            assert tokens == alone


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_few_rows_and_other_types_are_sampled_too(
    count: int, dtype: torch.dtype, mode: str
) -> None:
    generator = torch.Generator().manual_seed(8)
    logits = (torch.randn(count, 66, generator=generator) * 3).to(dtype)
    params = params_of(*MIXTURE, seeds=list(range(len(MIXTURE))))
    rows = rows_of(np.arange(count) + 11, np.arange(count))
    alone = draw(logits.float().numpy(), rows, params).tolist() if count else []
    for size in (2, 3):
        assert sample_on(size, mode, logits, rows, params) == [alone] * size


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("by", [Filters(temperature=0.0), Filters(), Filters(top_k=5)], ids=str)
def test_a_row_that_is_not_finite_on_one_rank_fails_alone(by: Filters, mode: str) -> None:
    logits = torch.randn(6, 300, generator=torch.Generator().manual_seed(4))
    logits[1, 7] = torch.nan
    logits[2, 150] = torch.inf
    logits[3, 299] = -torch.nan
    logits[4] = -torch.inf
    params = params_of(*[by] * 6, seeds=list(range(6)))
    rows = rows_of(range(6), range(6))
    alone = draw(logits.numpy(), rows, params).tolist()
    assert alone[1:5] == [NOT_FINITE] * 3 + [NOTHING_ALLOWED]
    assert sample_on(3, mode, logits, rows, params) == [alone] * 3


def test_batch_mates_do_not_show_in_any_mode() -> None:
    logits = torch.from_numpy(rows_of_all_kinds(600)["steep"].astype(np.float32))
    params = params_of(*MIXTURE, seeds=list(range(len(MIXTURE))))
    together = draw(logits.numpy(), rows_of(range(len(MIXTURE)), range(len(MIXTURE))), params)
    some = np.random.default_rng(9).permutation(len(MIXTURE))[:7]
    for mode in MODES:
        (tokens, _) = sample_on(2, mode, logits[some], rows_of(some, some), params)
        assert tokens == together[some].tolist()


def undecided(logits: np.ndarray, by: Filters, size: int = 2) -> int:
    """How many rows the candidates do not decide."""
    count, vocab_size = logits.shape
    params = params_of(*[by] * count, seeds=list(range(count)))
    rows = rows_of(range(count), range(count))

    def work(communicator: HostCommunicator) -> np.ndarray:
        width = vocab_size // size
        shard = logits[:, communicator.rank * width :][:, :width]
        tokens = np.empty(count, np.int32)
        sampler = VocabSampler(width, count, communicator)
        sampler.sample(np.ascontiguousarray(shard, np.float32), rows, params, tokens)
        return tokens

    first, *others = on_ranks(size, count, vocab_size, work)
    assert all(np.array_equal(first, other) for other in others)
    return int((first == candidates.UNDECIDED).sum())


def kept_by_candidates(row: np.ndarray, by: Filters, size: int) -> set[int] | None:
    """What the exchanged candidates keep of a row; None where they do not decide it."""
    vocab_size = len(row)
    row = np.array(row, np.float32)
    params, rows = params_of(by), rows_of([0], [0])

    def work(communicator: HostCommunicator) -> set[int] | None:
        width = vocab_size // size
        sampler = VocabSampler(width, 1, communicator)
        shard = row[communicator.rank * width :][:width]
        token = np.empty(1, np.int32)
        sampler.sample(shard[np.newaxis].copy(), rows, params, token)
        kept = np.flatnonzero(row.astype(np.float64) >= sampler.thresholds[0])
        return None if token[0] == candidates.UNDECIDED else set(kept.tolist())

    first, *others = on_ranks(size, 1, vocab_size, work)
    assert all(other == first for other in others)
    return first


@pytest.mark.parametrize("name", rows_of_all_kinds(30))
def test_candidates_that_decide_keep_what_a_sort_keeps(name: str) -> None:
    row = rows_of_all_kinds(1500)[name][0]
    decided = 0
    filtered = [by for by in MIXTURE if 0 < by.top_k < 1500 or by.top_p < 1 or by.min_p > 0]
    for by in filtered:
        kept = kept_by_candidates(row, by, 3)
        if kept is not None:
            assert reference_kept(row, by, -1e-7) <= kept <= reference_kept(row, by, 1e-7)
            decided += 1
    # Hundreds of equal logits do not fit a message.
    assert decided > 5 or name in ("all equal", "both ends of float32")


def test_candidates_decide_whatever_is_narrow_enough() -> None:
    logits = np.random.default_rng(5).normal(0, 3, (20, 4000))
    for by in (
        Filters(temperature=0.0),
        Filters(),
        Filters(top_k=1),
        Filters(top_k=50, top_p=0.95, min_p=0.02),
        Filters(top_k=256),
        Filters(min_p=0.2),
        Filters(top_p=0.3, temperature=0.7),
        Filters(top_p=0.9999, min_p=0.2),
    ):
        assert undecided(logits, by) == 0, by


def test_candidates_do_not_pretend_to_decide_the_rest() -> None:
    flat = np.random.default_rng(5).normal(0, 0.01, (20, 4000))
    for by in (Filters(top_k=3000), Filters(top_p=0.9), Filters(min_p=0.5)):
        assert undecided(flat, by) == 20, by
    ties = np.zeros((3, 4000))
    assert undecided(ties, Filters(top_k=2)) == 3
    assert undecided(ties, Filters()) == 0


def test_auto_goes_by_the_times_of_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    def measure(self: Any, kind: int, count: int, mode: str) -> int:
        # Every rank has found something else; rank 0: vocab, but sequence for many filtered rows.
        best = (VOCAB, GATHER)[self._communicator.rank]
        if self._communicator.rank == 0 and kind == candidates.FILTERED and count == 16:
            best = SEQUENCE
        return 1 if mode == best else 2

    monkeypatch.setattr(Sampler, "_measure_ns", measure)
    params = params_of(Filters(temperature=0.0), Filters(), *[Filters(top_k=3)] * 14)

    def work(communicator: HostCommunicator) -> list[str]:
        sampler = Sampler(64, 16, communicator, AUTO)
        assert sampler.mode_for(rows_of([0], [0]), params) == SEQUENCE  # Nothing is known yet.
        sampler.tune()
        steps = ([0], [0, 1], [0, 1, 2], list(range(8)), list(range(16)))
        return [sampler.mode_for(rows_of(slots, slots), params) for slots in steps]

    expected = [VOCAB, VOCAB, VOCAB, VOCAB, SEQUENCE]
    assert on_ranks(2, 16, 64, work) == [expected, expected]


def test_auto_lets_a_way_rest_that_decides_little(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Sampler, "_measure_ns", lambda self, kind, count, mode: 1 if mode == VOCAB else 2
    )
    flat = torch.zeros(2, 2000)
    params = params_of(Filters(top_p=0.9), Filters())
    both, plain = rows_of([0, 0], [0, 1]), rows_of([1], [0])

    def work(communicator: HostCommunicator) -> list[str]:
        sampler = Sampler(2000, 2, communicator, AUTO)
        sampler.tune()
        shard = flat.chunk(2, dim=1)[communicator.rank]
        modes = []
        for _ in range(70):
            modes.append(sampler.mode_for(both, params))
            sampler.sample(shard, both, params)
        assert sampler.mode_for(plain, params) == VOCAB
        assert sampler.undecided == 4
        return modes

    expected = [VOCAB, *[SEQUENCE] * 64, VOCAB, *[SEQUENCE] * 4]
    assert on_ranks(2, 2, 2000, work) == [expected, expected]


def test_auto_measures_and_then_samples() -> None:
    logits = torch.randn(4, 256, generator=torch.Generator().manual_seed(2))
    params = params_of(*MIXTURE[:4])
    rows = rows_of(range(4), range(4))
    alone = draw(logits.numpy(), rows, params).tolist()

    def work(communicator: HostCommunicator) -> tuple[str, list[int]]:
        sampler = Sampler(256, 4, communicator, AUTO)
        sampler.tune()
        shard = logits.chunk(2, dim=1)[communicator.rank]
        return sampler.mode_for(rows, params), sampler.sample(shard, rows, params).tolist()

    results = on_ranks(2, 4, 256, work)
    assert results[0] == results[1]
    assert results[0][0] in MODES
    assert results[0][1] == alone


def test_a_mode_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="no sampling mode 'best': choose one of gather, sequence"):
        on_ranks(1, 4, 64, lambda communicator: Sampler(64, 4, communicator, "best"))
