"""Log-probabilities against numpy in float64, on one rank and on several."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from albireo.ipc.plan import LOGPROB_WORDS, MAX_TOP_LOGPROBS
from albireo.workers.parallel.communicator import HostCommunicator
from albireo.workers.sampling.logprobs import Logprobs

from .sampling_ranks import on_ranks


def describe(
    logits: np.ndarray, tokens: list[int], best: list[int], size: int = 1, max_rows: int = 4
) -> np.ndarray:
    """The records of a group of `size` ranks, without their first two words."""
    whole = torch.from_numpy(np.array(logits, np.float32))
    vocab_size = whole.shape[1]

    def work(communicator: HostCommunicator) -> np.ndarray:
        shard = whole.chunk(size, dim=1)[communicator.rank]
        records = Logprobs(vocab_size, max_rows, communicator).describe(
            shard, np.array(tokens, np.int32), np.array(best, np.int32)
        )
        return records[:, 2:]

    first, *others = on_ranks(size, max_rows, vocab_size, work)
    assert all(np.array_equal(first, other) for other in others)
    return first


def rows() -> np.ndarray:
    random = np.random.default_rng(7)
    steep = random.normal(0, 4, 600)
    masked = np.where(random.random(600) < 0.99, -np.inf, steep)
    masked[17] = 1.0
    huge = steep.copy()
    huge[400] = 3e38
    return np.array([
        steep, np.round(steep), np.zeros(600), masked, huge, np.linspace(-3, 3, 600),
    ]).astype(np.float32)  # fmt: skip


@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("best", [0, 1, 5, 20])
def test_records_are_those_of_the_log_softmax(best: int, size: int) -> None:
    logits = rows()
    tokens = [3, 599, 100, 17, 400, 0]
    records = describe(logits, tokens, [best] * len(tokens), size)
    for row, token, record in zip(logits, tokens, records, strict=True):
        z = row.astype(np.float64)
        logprobs = z - z.max() - math.log(np.exp(z - z.max()).sum())
        floats = record.view(np.float32)
        assert floats[0] == pytest.approx(logprobs[token], rel=2e-7, abs=2e-7)
        assert record[1] == 1 + (row > row[token]).sum()
        order = np.argsort(-z, kind="stable")[:best]
        order = order[z[order] > -np.inf]
        ids, values = record[2:22], floats[22:]
        assert ids[: len(order)].tolist() == order.tolist()
        assert np.allclose(values[: len(order)], logprobs[order], rtol=2e-7, atol=2e-7)
        assert (ids[len(order) :] == -1).all()
        assert (values[len(order) :] == -np.inf).all()


def test_the_number_of_ranks_does_not_show() -> None:
    tokens, best = [0, 1, 2, 3, 4, 5], [20, 0, 3, 7, 20, 1]
    alone = describe(rows(), tokens, best)
    for size in (2, 3):
        assert np.array_equal(describe(rows(), tokens, best, size), alone)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_has_no_logprobs(bad: float) -> None:
    logits = np.zeros((2, 60), np.float32)
    logits[0, 40] = bad
    records = describe(logits, [1, 2], [2, 2])
    assert math.isnan(records[0].view(np.float32)[0])
    assert (records[0, 2:22] == -1).all()
    assert records[1].view(np.float32)[0] == pytest.approx(-math.log(60))
    assert records[1, 2:4].tolist() == [0, 1]


def test_a_record_has_the_words_of_the_plan() -> None:
    records = describe(np.zeros((1, 60)), [0], [MAX_TOP_LOGPROBS])
    assert records.shape == (1, LOGPROB_WORDS - 2)
    assert describe(np.zeros((0, 60)), [], []).shape == (0, LOGPROB_WORDS - 2)
