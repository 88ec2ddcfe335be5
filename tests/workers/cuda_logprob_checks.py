"""Checks of the GPU's logprobs, for the interpreter and for a real GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from albireo.ipc.plan import MAX_TOP_LOGPROBS
from albireo.workers.parallel.communicator import SingleRank
from albireo.workers.sampling.cuda.logprobs import Logprobs

from .cuda_sampling_checks import InTurn

_TOP = MAX_TOP_LOGPROBS


def records_of(
    logits: np.ndarray,
    tokens: np.ndarray,
    asks: np.ndarray,
    device: str,
    dtype: torch.dtype = torch.float32,
    ranks: int = 1,
    scores: bool = False,
) -> np.ndarray:
    """Records of `ranks` ranks, which must agree; asks: by row, of slots in another order."""
    count, vocab = logits.shape
    width = vocab // ranks
    slots = torch.arange(count - 1, -1, -1, dtype=torch.int32, device=device)
    by_slot = torch.from_numpy(asks.astype(np.int32)[::-1].copy()).to(device)
    drawn = torch.from_numpy(tokens.astype(np.int32)).to(device)
    found: dict[int, np.ndarray] = {}

    def work(communicator: Any) -> None:
        rank = communicator.rank
        shard = torch.from_numpy(logits[:, rank * width : (rank + 1) * width].copy())
        shard = shard.to(device, dtype)
        logprobs = Logprobs(count + 2, count + 1, width, rank * width, communicator, device)
        if scores:
            logprobs.score(shard, drawn)
            found[rank] = logprobs.score_records[:count].cpu().numpy()
        else:
            logprobs.keep(shard, slots, by_slot)
            shard.fill_(7.0)  # What sampling does to them is not to be seen.
            logprobs.finish(slots, by_slot, drawn)
            found[rank] = logprobs.records[:count].cpu().numpy()

    if ranks == 1:
        work(SingleRank())
    else:
        InTurn(ranks, device).run(work)
    for rank in range(1, ranks):
        assert np.array_equal(found[rank], found[0])
    return found[0]


def check_records(
    records: np.ndarray, logits: np.ndarray, tokens: np.ndarray, asks: np.ndarray
) -> None:
    """Against torch.log_softmax in float64; rows that ask for nothing stay zeros."""
    logprobs = torch.log_softmax(torch.from_numpy(logits).double(), 1).numpy()
    for record, row, expected, token, ask in zip(
        records, logits, logprobs, tokens, asks, strict=True
    ):
        if ask == 0:
            assert not record.any()
            continue
        floats = record.view(np.float32)
        assert abs(floats[2] - expected[token]) < 2e-5 * max(1, abs(expected[token]))
        assert record[3] == 1 + (row > row[token]).sum()
        best = np.lexsort((np.arange(len(row)), -row.astype(np.float64)))
        best = best[row[best] > -np.inf][: ask - 1]
        assert record[4 : 4 + len(best)].tolist() == best.tolist()
        assert (record[4 + len(best) : 4 + _TOP] == -1).all()
        top = floats[4 + _TOP : 4 + 2 * _TOP]
        np.testing.assert_allclose(top[: len(best)], expected[best], rtol=2e-5, atol=2e-5)
        assert np.isneginf(top[len(best) :]).all()


def rows_to_check(random: np.random.Generator, rows: int, vocab: int) -> np.ndarray:
    """[rows, vocab] float32 that bfloat16 holds exactly: ties, -inf, one huge, all equal."""
    logits = random.normal(0, 3, (rows, vocab)).astype(np.float32)
    logits[1] = np.round(logits[1])
    logits[2, random.random(vocab) < 0.9] = -np.inf
    logits[3, 5] = 60.0
    logits[4] = 1.5
    logits[5, 4:] = -np.inf
    return torch.from_numpy(logits).bfloat16().float().numpy()


def check(
    seed: int, vocab: int, device: str, dtype: torch.dtype, ranks: int, scores: bool, rows: int
) -> None:
    random = np.random.default_rng(seed)
    logits = rows_to_check(random, rows, vocab)
    there = [np.flatnonzero(row > -np.inf) for row in logits]
    tokens = np.array([random.choice(each) for each in there])
    asks = np.full(rows, _TOP + 1) if scores else random.choice([0, 1, 2, 6, _TOP + 1], rows)
    records = records_of(logits, tokens, asks, device, dtype, ranks, scores)
    check_records(records, logits, tokens, asks)
