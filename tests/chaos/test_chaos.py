"""The chaos run's own parts: a check that cannot fail would be none."""

from __future__ import annotations

import itertools
import random

import pytest

from .load import Life, Story
from .plan import Cell, all_cells, in_order, pairwise
from .run import Report, Visit, _check_lives

STORY = Story([1, 2], {"max_tokens": 4}, False, (5, 6, 7, 8), "abcd")


def life(**changes: object) -> Life:
    made = Life(STORY, False, began=10.0)
    made.tokens, made.text, made.times = [5, 6, 7, 8], "abcd", [11.0, 11.1, 11.2, 11.3]
    made.ends, made.over = 1, 11.3
    for name, value in changes.items():
        setattr(made, name, value)
    return made


def wrong(*lives: Life, visits: tuple[Visit, ...] = ()) -> list[str]:
    report = Report(visits=list(visits))
    _check_lives(list(lives), report)
    return report.wrong


def test_an_undisturbed_answer_is_right() -> None:
    assert wrong(life(), life(http=True, tokens=[])) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"tokens": [5, 6, 9, 8]},
        {"text": "abxd"},
        {"tokens": [5, 6, 6, 7, 8]},
        {"ends": 0},
        {"ends": 2},
        {"wrong": "no end"},
        {"lost": "ConnectionLost", "ends": 0},
        {"http": True, "text": "ab", "tokens": [], "ends": 0},
    ],
)
def test_everything_else_is_wrong(changes: dict[str, object]) -> None:
    assert wrong(life(**changes))


def test_a_lost_connection_is_excused_by_a_fault_on_its_way_alone() -> None:
    lost = life(lost="ConnectionLost", ends=0, tokens=[5, 6], text="ab", over=11.2)
    cases = (("router", 11.0, True), ("worker", 11.0, False), ("router", 14.0, False))
    for role, when, right in cases:
        visit = Visit(Cell(role, "stream", "kill"), when, when + 0.5)
        assert (wrong(lost, visits=(visit,)) == []) == right


def test_a_selection_has_every_pair() -> None:
    cells = all_cells()
    chosen = pairwise(cells, random.Random(3))
    assert len(chosen) < len(cells) / 2
    for one, other in itertools.combinations(range(3), 2):
        assert {(c[one], c[other]) for c in chosen} == {(c[one], c[other]) for c in cells}
    assert sorted(in_order(cells, random.Random(3))) == sorted(cells)
