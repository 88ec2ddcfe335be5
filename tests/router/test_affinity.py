"""Requests with a common prefix go to the same group, until it is clearly busier."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from albireo.ipc.config import TenantConfig
from albireo.ipc.messages import Credit, GroupDown, Submit
from albireo.router.affinity import PIECE, GroupPrefixes, names_of
from albireo.router.tenants import Tenants

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

    def __init__(self, start: Start, **changes: Any) -> None:
        near = start(num_groups=2, max_model_len=LONG, num_blocks=LONG, **changes)
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

    def ask(self, prompt: list[int], salt: str = "", tenant: str = "") -> None:
        self._number += 1
        self.client.send(
            type="generate", id=self._number, prompt_ids=prompt, params={"max_tokens": 10},
            cache_salt=salt, tenant=tenant,
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


_names = st.text(alphabet="1:a#.", max_size=4)


@given(_names, _names, _names, _names)
def test_no_tenant_and_salt_look_like_others(
    one: str, its_salt: str, other: str, others_salt: str
) -> None:
    tenants = Tenants(TenantConfig(isolated=True))
    salts = tenants.terms(one, its_salt).cache_salt, tenants.terms(other, others_salt).cache_salt
    assert (salts[0] == salts[1]) == ((one, its_salt) == (other, others_salt))
    assert Tenants(TenantConfig()).terms(one, its_salt).cache_salt == its_salt


def test_isolated_tenants_do_not_find_each_others_prefixes(start: Start) -> None:
    node = _Node(start, tenants=TenantConfig(isolated=True))
    for tenant in ("one", "another", "one"):
        node.ask(PROMPT, tenant=tenant)
    assert node.in_flight() == [2, 1]
    assert [each["found_tokens"] for each in node.status()] == [len(PROMPT), 0]
    one, another = (group.expect(Submit).cache_salt for group in node.groups)
    assert one != another


@pytest.mark.parametrize("incarnation", [0, 5])
def test_connections_without_a_name_are_isolated_also_from_those_of_an_earlier_router(
    start: Start, incarnation: int
) -> None:
    near = start(incarnation=incarnation, tenants=TenantConfig(isolated=True))
    group = near.group()
    salts = set()
    for _ in range(2):
        near.client().send(type="generate", id=1, prompt_ids=[7])
        salts.add(group.expect(Submit).cache_salt)
    # Groups outlive a router, and what they have cached does too.
    assert salts == {f"4:#{incarnation}.{connection}" for connection in (1, 2)}


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
