"""The draw as a specification: how often a token is drawn, and what that depends on."""

from __future__ import annotations

import math

import numpy as np
import pytest

from albireo.ipc.plan import TAKE_WORDS
from albireo.workers.sampling.draw import NOT_FINITE, NOTHING_ALLOWED
from albireo.workers.sampling.edits import SlotEdits
from albireo.workers.sampling.filters import BLOCK
from albireo.workers.sampling.params import SlotParams
from albireo.workers.sampling.philox import DOMAIN, philox4x32, token_words

from ..plans import plan_of
from .edit_reference import Ask
from .sampling_reference import COMBINATIONS, Filters, draw, params_of, reference_kept, rows_of

DRAWS = 200_000

# ------------------------------------------------------------------ random numbers


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        (
            [0xFFFFFFFF] * 4,
            [0xFFFFFFFF] * 2,
            [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD],
        ),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_known_answers_of_random123(
    counter: list[int], key: list[int], expected: list[int]
) -> None:
    words = philox4x32(np.array(counter, np.uint64), np.array(key, np.uint64))
    assert [int(word) for word in words] == expected


def test_a_token_has_its_own_word_of_seed_position_and_id() -> None:
    seed, position = 0xDEADBEEF12345678, 9
    words = np.empty(12, np.uint32)
    token_words(np.uint64(seed), np.int64(position), np.int64(8), words)
    key = np.array([seed & 0xFFFFFFFF, seed >> 32], np.uint64)
    for token in range(8, 20):
        counter = np.array([token // 4, position, 0, DOMAIN], np.uint64)
        assert words[token - 8] == philox4x32(counter, key)[token % 4]


# ------------------------------------------------------------------ how often


def assert_distributed(tokens: np.ndarray, probabilities: np.ndarray) -> None:
    """Chi-square with p > 0.001, by Wilson and Hilferty's approximation."""
    counts = np.bincount(tokens, minlength=len(probabilities))
    assert not counts[probabilities == 0].any()
    expected = probabilities * len(tokens)
    # Cells of fewer than 10 expected draws are pooled.
    small = expected < 10
    observed = np.append(counts[~small], counts[small].sum())
    expected = np.append(expected[~small], expected[small].sum())
    observed, expected = observed[expected > 0], expected[expected > 0]
    freedom = len(observed) - 1
    if freedom == 0:
        return
    statistic = ((observed - expected) ** 2 / expected).sum()
    spread = 2 / (9 * freedom)
    z = ((statistic / freedom) ** (1 / 3) - (1 - spread)) / math.sqrt(spread)
    assert z < 3.09, f"chi-square {statistic:.1f} at {freedom} degrees of freedom"


@pytest.mark.parametrize("vary", ["position", "seed"])
@pytest.mark.parametrize(
    "by",
    [
        Filters(),
        Filters(temperature=0.5),
        Filters(temperature=4.0),
        Filters(top_k=10),
        Filters(top_p=0.8),
        Filters(min_p=0.2),
        Filters(temperature=0.7, top_k=30, top_p=0.95),
        Filters(temperature=1.3, top_k=60, min_p=0.02),
        Filters(temperature=2.0, top_p=0.9, min_p=0.05),
        Filters(temperature=1.5, top_k=40, top_p=0.9, min_p=0.01),
    ],
    ids=str,
)
def test_draws_follow_the_softmax_over_what_is_kept(by: Filters, vary: str) -> None:
    logits = np.random.default_rng(3).normal(0, 2, 100).astype(np.float32)
    batch = np.tile(logits, (DRAWS, 1))
    number = np.arange(DRAWS)
    if vary == "position":
        params, rows = params_of(by, seeds=[77]), rows_of(np.zeros(DRAWS), number)
    else:
        params, rows = params_of(by), rows_of(number, np.full(DRAWS, 5))
        params = SlotParams(
            seed=(number * 0x1_0000_0001).astype(np.uint64),
            temperature=np.repeat(params.temperature, DRAWS),
            top_k=np.repeat(params.top_k, DRAWS),
            top_p=np.repeat(params.top_p, DRAWS),
            min_p=np.repeat(params.min_p, DRAWS),
        )
    kept = np.isin(np.arange(len(logits)), list(reference_kept(logits, by)))
    weights = np.where(kept, np.exp(logits.astype(np.float64) / by.temperature), 0.0)
    assert_distributed(draw(batch, rows, params), weights / weights.sum())


@pytest.mark.parametrize(
    ("ask", "by"),
    [
        (Ask(repetition=1.5), Filters()),
        (Ask(presence=1.0, frequency=0.3), Filters(temperature=0.8)),
        (Ask(biases={5: 4.0, 9: -4.0}, allowed=tuple(range(0, 100, 3))), Filters(top_p=0.95)),
        (
            Ask(
                repetition=0.8, presence=-0.5, frequency=0.2, biases={1: 3.0, 50: 1.0},
                bad_words=((3,), (7, 8)), banned=(60,), min_tokens=3,
            ),
            Filters(temperature=1.2, top_k=40, top_p=0.95, min_p=0.01),
        ),
    ],
    ids=str,
)  # fmt: skip
def test_draws_follow_the_softmax_over_what_is_left_of_edited_logits(ask: Ask, by: Filters) -> None:
    logits = np.random.default_rng(3).normal(0, 2, 100).astype(np.float32)
    prompt, output = [1, 2, 3, 4], [50, 51, 51, 60, 7]
    take = [0] * TAKE_WORDS
    ask.write_take(take, len(prompt))
    edits = SlotEdits(1, len(logits))
    tokens = prompt + output
    chunk = [[0, 0, len(tokens), 1]]
    edits.apply_plan(
        plan_of(1, 16, 4, 64, take=[take], edit=ask.edit_rows(0), chunk=chunk, chunk_token=tokens)
    )
    row = np.array([logits])
    edits.apply(row, rows_of([0], [len(tokens)]))
    params, rows = params_of(by, seeds=[78]), rows_of(np.zeros(DRAWS), np.arange(DRAWS))
    expected = ask.edited(logits, prompt, output)
    assert np.array_equal(row[0], expected)
    kept = np.isin(np.arange(len(logits)), list(reference_kept(expected, by)))
    weights = np.where(kept, np.exp(expected.astype(np.float64) / by.temperature), 0.0)
    assert_distributed(draw(np.tile(row, (DRAWS, 1)), rows, params), weights / weights.sum())


def test_pruning_never_changes_the_winner() -> None:
    random = np.random.default_rng(2)
    size, count, seed = 700, 300, 123456789012345
    logits = (random.normal(0, 1, (count, size)) * random.uniform(0, 12, (count, 1))).astype(
        np.float32
    )
    tokens = draw(
        logits, rows_of(np.zeros(count), range(count)), params_of(Filters(), seeds=[seed])
    )
    words = np.empty(size, np.uint32)
    for position in range(count):
        token_words(np.uint64(seed), np.int64(position), np.int64(0), words)
        gumbel = -np.log(-np.log((words + 0.5) / 2.0**32))
        row = logits[position].astype(np.float64)
        assert tokens[position] == int(np.argmax(row - row.max() + gumbel))


# ------------------------------------------------------------------ greedy and bad rows


def test_greedy_takes_the_first_of_the_best() -> None:
    random = np.random.default_rng(1)
    logits = np.round(random.normal(0, 3, (64, 1000)), 1).astype(np.float32)
    logits[0] = 0.0
    logits[1] = np.where(np.arange(1000) < 3, -1.0, -0.0)
    logits[1, 900] = 0.0
    logits[2] = -np.inf
    logits[2, 999] = -1e30
    tokens = draw(logits, rows_of(np.zeros(64), range(64)), params_of(Filters(temperature=0.0)))
    assert tokens.tolist() == logits.argmax(axis=1).tolist()


@pytest.mark.parametrize("temperature", [0.0, 1e-45, 1.0, 100.0])
@pytest.mark.parametrize("size", [1, 3, BLOCK, BLOCK + 1, 1000])
def test_only_the_row_that_is_not_finite_fails(temperature: float, size: int) -> None:
    minus_nan = np.array([0xFFC00001], np.uint32).view(np.float32)[0]
    random = np.random.default_rng(4)
    logits = random.normal(0, 3, (6, size)).astype(np.float32)
    at = size // 2
    logits[1, at] = np.nan
    logits[2, at] = minus_nan
    logits[3, at] = np.inf
    logits[4] = -np.inf
    by = Filters(temperature=temperature, top_p=0.9, top_k=5)
    alone = draw(logits[5:], rows_of([0], [5]), params_of(by))
    tokens = draw(logits, rows_of([0] * 6, range(6)), params_of(by))
    assert tokens[1:5].tolist() == [NOT_FINITE] * 3 + [NOTHING_ALLOWED]
    assert tokens[0] >= 0
    assert tokens[5] == alone[0]


def test_tiny_temperatures_are_greedy_and_do_not_overflow() -> None:
    random = np.random.default_rng(6)
    logits = (random.normal(0, 1, (50, 2000)) * 1e37).astype(np.float32)
    by = Filters(temperature=1e-45)
    tokens = draw(logits, rows_of(np.zeros(50), range(50)), params_of(by))
    assert tokens.tolist() == logits.argmax(axis=1).tolist()


# ------------------------------------------------------------------ what a draw depends on


MIXTURE = [Filters(temperature=0.0), *COMBINATIONS]


def test_neither_row_order_nor_batch_mates_show() -> None:
    random = np.random.default_rng(9)
    count = len(MIXTURE)
    logits = random.normal(0, 4, (count, 1000)).astype(np.float32)
    params = params_of(*MIXTURE, seeds=list(range(count)))
    together = draw(logits, rows_of(range(count), range(count)), params)
    order = random.permutation(count)
    shuffled = draw(logits[order], rows_of(order, order), params)
    assert shuffled.tolist() == together[order].tolist()
    for row in range(count):
        alone = draw(logits[row : row + 1], rows_of([row], [row]), params)
        assert alone[0] == together[row]


def test_seed_and_position_do_show() -> None:
    logits = np.zeros((400, 1000))
    low, high = 1, 1 << 32
    params = params_of(Filters(), Filters(), seeds=[low, high])
    streams = [draw(logits, rows_of([slot] * 400, range(400)), params) for slot in (0, 1)]
    assert len(set(streams[0].tolist())) > 250
    assert (streams[0] == streams[1]).sum() < 20
