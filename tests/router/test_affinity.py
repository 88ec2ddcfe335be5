"""Requests with a common prefix go to the same group, until it is clearly busier."""

from __future__ import annotations

import time
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from albireo.ipc.messages import Credit, GroupDown, Submit
from albireo.router.affinity import PIECE, GroupPrefixes, names_of

from .conftest import Neighbourhood
from .fakes import FakeGroup, RawClient, piece

Start = Callable[..., Neighbourhood]
LONG = 4096
_tokens = st.lists(st.integers(0, 2**31 - 1), max_size=5 * PIECE)


@given(_tokens, _tokens, _tokens)
def test_names_stand_for_whole_prefixes(
    common: list[int], one: list[int], other: list[int]
) -> None:
    a, b = names_of(common + one, ""), names_of(common + other, "")
    assert len(a) == len(common + one) // PIECE
    same = 0
    while same < min(len(a), len(b)) and a[same] == b[same]:
        same += 1
    shared = 0
    for x, y in zip(common + one, common + other, strict=False):
        if x != y:
            break
        shared += 1
    assert same == shared // PIECE
    assert names_of(common + one, "", names_of(common, "")) == a
    assert not set(a) & set(names_of(common + one, "salt"))


def test_what_a_group_knows_is_bounded_and_forgets_ends_first() -> None:
    known = GroupPrefixes(4 * PIECE)
    old, new = names_of(list(range(3 * PIECE)), ""), names_of(list(range(9, 9 + 2 * PIECE)), "")
    known.add(old)
    assert known.found(old) == 3 * PIECE
    known.add(new)
    assert len(known) == 4
    assert known.found(new) == 2 * PIECE and known.found(old) == 2 * PIECE
    known.clear()
    assert known.found(new) == 0


class _Node:
    """Two groups; how many requests each has got is what is asked."""

    def __init__(self, start: Start) -> None:
        near = start(num_groups=2, max_model_len=LONG, num_blocks=LONG)
        self.groups: list[FakeGroup] = [near.group(0), near.group(1)]
        self.supervisor = near.supervisor()
        self.client: RawClient = near.client()
        self._number = 0
        while self.states() != ["ready", "ready"]:
            time.sleep(0.002)

    def states(self) -> list[str]:
        return [each["state"] for each in self.status()]

    def status(self) -> list[dict[str, object]]:
        self.client.send(type="status", id=10_000)
        groups: list[dict[str, object]] = self.client.receive()["status"]["groups"]
        return groups

    def ask(self, prompt: list[int], salt: str = "") -> None:
        self._number += 1
        self.client.send(
            type="generate", id=self._number, prompt_ids=prompt, params={"max_tokens": 10},
            cache_salt=salt,
        )  # fmt: skip

    def in_flight(self) -> list[object]:
        return [each["in_flight"] for each in self.status()]


PROMPT = [7] * (4 * PIECE)


def test_a_common_prefix_goes_where_it_was(start: Start) -> None:
    node = _Node(start)
    for number in range(3):
        node.ask([*PROMPT, number])
    # The third finds 256 tokens there, worth 512: less than the two that are outstanding.
    assert node.in_flight() == [2, 1]
    assert [each["found_tokens"] for each in node.status()] == [len(PROMPT), 0]


def test_a_salt_keeps_prefixes_apart(start: Start) -> None:
    node = _Node(start)
    node.ask(PROMPT, "one")
    node.ask(PROMPT, "another")
    assert node.in_flight() == [1, 1]


def test_an_answer_is_part_of_the_next_prompt(start: Start) -> None:
    node = _Node(start)
    node.ask(PROMPT)
    request = node.groups[0].expect(Submit).request
    answer = [9] * PIECE
    node.groups[0].output(piece(request, 0, answer, "", "length"))
    assert node.client.receive()["items"]
    assert node.groups[0].expect(Credit)
    node.ask(PROMPT + answer)
    assert node.groups[0].expect(Submit)
    assert node.status()[0]["found_tokens"] == len(PROMPT + answer)


def test_a_group_that_died_has_forgotten(start: Start) -> None:
    node = _Node(start)
    node.ask(PROMPT)
    node.groups[0].expect(Submit)
    node.supervisor.send(GroupDown(0, 0, "killed"))
    node.client.expect_error("group_failed", 1)
    node.ask(PROMPT)
    assert node.groups[1].expect(Submit)
    assert [each["found_tokens"] for each in node.status()] == [0, 0]
