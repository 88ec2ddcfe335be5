"""Ranks that sample different tokens are found, with both sides in the log."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import numpy as np
import pytest

from albireo.ipc.shared_memory import create
from albireo.workers.parallel.canary import INTERVAL, Canary, RanksDisagree, canary_bytes

RANKS, MOST = 3, 8


@pytest.fixture
def ranks() -> Iterator[list[Canary]]:
    memory = create("canary", canary_bytes(RANKS, MOST))
    yield [Canary(memory, rank, RANKS, MOST) for rank in range(RANKS)]
    os.close(memory)


def rows(step: int, count: int = MOST) -> np.ndarray:
    """Of a step: the last one could not be sampled."""
    found = np.array([(100 + i, 1, step * 7 + i) for i in range(count)], np.int32).reshape(-1, 3)
    found[-1:, 1:] = 0
    return found


def test_the_same_is_never_a_difference(ranks: list[Canary]) -> None:
    for step in range(1, 6 * INTERVAL):
        for rank in ranks:
            rank.check(step, rows(step, step // INTERVAL % (MOST + 1)))


@pytest.mark.parametrize(("column", "interval"), [(0, 1), (1, 1), (2, 1), (2, 2), (1, 3), (2, 6)])
def test_a_difference_is_found_an_interval_later(
    ranks: list[Canary], column: int, interval: int, caplog: pytest.LogCaptureFixture
) -> None:
    """interval: with a difference; what was the same before it was compared, too."""
    step = interval * INTERVAL
    for before in range(INTERVAL, step, INTERVAL):
        for rank in ranks:
            rank.check(before, rows(before))
    for number, rank in enumerate(ranks):
        wrong = rows(step)
        wrong[3, column] += number == 1
        rank.check(step, wrong)
    ranks[2].check(step + 1, rows(1))
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(RanksDisagree, match=rf"ranks 2 and 1 disagree about step {step}:"),
    ):
        ranks[2].check(step + INTERVAL, rows(step + INTERVAL))
    token = int(rows(step)[3, 2])
    assert f"rank 2 sampled (request, token): [(100, {token - 3})" in caplog.text
    assert "rank 1 sampled (request, token)" in caplog.text
    assert "(107, -1)" in caplog.text


def test_a_missing_row_is_a_difference(ranks: list[Canary]) -> None:
    ranks[0].check(INTERVAL, rows(INTERVAL))
    ranks[1].check(INTERVAL, rows(INTERVAL)[:-1])
    with pytest.raises(RanksDisagree, match="8 and 7 rows"):
        ranks[0].check(2 * INTERVAL, rows(2 * INTERVAL))


def test_who_is_behind_is_not_waited_for(ranks: list[Canary]) -> None:
    ranks[0].check(INTERVAL, rows(INTERVAL))
    ranks[0].check(2 * INTERVAL, rows(2 * INTERVAL))
    ranks[1].check(INTERVAL, rows(INTERVAL))
    ranks[1].check(2 * INTERVAL, rows(2 * INTERVAL))
