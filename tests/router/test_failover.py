"""Streams whose group dies go on behind what their clients have."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from albireo.ipc.messages import Abort, Credit, GroupDown, Piece, Submit
from albireo.ipc.protocol import Logprobs, TokenLogprob
from albireo.router.failover import TRIAL_TOKENS

from .conftest import Neighbourhood
from .fakes import FakeGroup, RawClient, piece
from .test_groups import wait_for_states

Start = Callable[..., Neighbourhood]


class _Node:
    """Two groups, a supervisor, and one client."""

    def __init__(self, start: Start, groups: int = 2, **changes: Any) -> None:
        self.near = start(num_groups=groups, max_failovers=2, **changes)
        self.groups: list[FakeGroup] = [self.near.group(number) for number in range(groups)]
        self.supervisor = self.near.supervisor()
        self.client: RawClient = self.near.client()
        wait_for_states(self.client, *["ready"] * groups)

    def ask(self, number: int = 1, **params: Any) -> Submit:
        """Of a request that the first group gets."""
        params = {"max_tokens": 20, **params}
        self.client.send(type="generate", id=number, prompt_ids=[5, 6, 7], params=params)
        submit: Submit = self.groups[0].expect(Submit)
        return submit

    def kill(self, group: int, incarnation: int = 0) -> None:
        self.supervisor.send(GroupDown(group, incarnation, "its worker was killed"))

    def requests(self) -> dict[str, int]:
        self.client.send(type="status", id=10_000)
        counts: dict[str, int] = self.client.receive()["status"]["requests"]
        return counts


def test_a_stream_goes_on_elsewhere_behind_what_the_client_has(start: Start) -> None:
    node = _Node(start)
    first = node.ask(seed=3, stop=["x"], min_tokens=4, logprobs=1)
    node.groups[0].output(piece(first.request, 0, [11, 12], "ab"))
    assert node.client.receive()["items"]
    node.kill(0)
    again = node.groups[1].expect(Submit)
    assert again.request != first.request
    assert (again.prompt_ids, again.resumed) == ([5, 6, 7, 11, 12], 2)
    for name in (
        "max_tokens",
        "min_tokens",
        "seed",
        "stop",
        "stop_token_ids",
        "logprobs",
        "tenant",
    ):
        assert getattr(again, name) == getattr(first, name)
    node.groups[1].output(piece(again.request, 2, [13], "c", "length", prompt=3))
    assert node.client.receive()["items"][0][:5] == [1, 2, [13], "c", ["length", None, 3, 3]]
    counts = node.requests()
    assert (counts["in_flight"], counts["finished"], counts["failed_over"]) == (0, 1, 1)


def test_who_waits_for_a_group_again_is_told_apart_from_newcomers(start: Start) -> None:
    node = _Node(start, groups=1)
    node.ask()
    node.kill(0)
    wait_for_states(node.client, "restarting")
    node.client.send(type="generate", id=2, prompt_ids=[2])
    counts = node.requests()
    assert (counts["waiting_for_group"], counts["waiting_for_readmission"]) == (2, 1)
    second = node.near.group(0, incarnation=1)
    assert [second.expect(Submit).prompt_ids for _ in range(2)] == [[5, 6, 7], [2]]
    counts = node.requests()
    assert (counts["waiting_for_group"], counts["waiting_for_readmission"]) == (0, 0)


def test_what_a_dead_group_still_says_is_ignored(start: Start) -> None:
    node = _Node(start)
    first = node.ask()
    node.kill(0)
    again = node.groups[1].expect(Submit)
    node.groups[0].output(piece(first.request, 0, [11], "late"))
    node.groups[1].output(piece(again.request, 0, [12], "a"))
    assert node.client.receive()["items"][0][:4] == [1, 0, [12], "a"]


def test_the_only_group_takes_its_streams_up_again_before_others(start: Start) -> None:
    node = _Node(start, groups=1)
    first = node.ask()
    node.groups[0].output(piece(first.request, 0, [11], "a"))
    assert node.client.receive()["items"]
    node.kill(0)
    wait_for_states(node.client, "restarting")
    node.client.send(type="generate", id=2, prompt_ids=[9])
    again = node.near.group(0, incarnation=1)
    assert again.expect(Submit).prompt_ids == [5, 6, 7, 11]
    assert again.expect(Submit).prompt_ids == [9]


def test_who_sees_too_many_groups_die_is_refused(start: Start) -> None:
    node = _Node(start, groups=1)
    node.ask()
    for incarnation in (1, 2):
        node.kill(0, incarnation - 1)
        node.near.group(0, incarnation=incarnation).expect(Submit)
    node.kill(0, 2)
    error = node.client.expect_error("group_failed", 1)
    assert not error["retry"] and "group 3 which ended under this" in error["message"]
    assert node.requests()["failed"] == 1


def test_who_kills_groups_is_found_and_the_others_go_on(start: Start) -> None:
    node = _Node(start, groups=1)
    for number in (1, 2):
        node.client.send(type="generate", id=number, prompt_ids=[number])
        node.groups[0].expect(Submit)
    node.kill(0)
    second = node.near.group(0, incarnation=1)
    assert [second.expect(Submit).prompt_ids for _ in range(2)] == [[1], [2]]
    node.kill(0, 1)
    # Both have one attempt left: one after the other.
    third = node.near.group(0, incarnation=2)
    assert third.expect(Submit).prompt_ids == [1]
    node.client.send(type="generate", id=3, prompt_ids=[3])
    assert third.expect(Submit).prompt_ids == [3], "a newcomer does not wait for a trial"
    counts = node.requests()
    assert (counts["waiting_for_group"], counts["waiting_for_readmission"]) == (1, 1)
    node.kill(0, 2)
    assert "only suspect" in node.client.expect_error("group_failed", 1)["message"]
    fourth = node.near.group(0, incarnation=3)
    assert [fourth.expect(Submit).prompt_ids for _ in range(2)] == [[2], [3]]
    node.kill(0, 3)
    node.client.expect_error("group_failed", 2)
    fifth = node.near.group(0, incarnation=4)
    newcomer = fifth.expect(Submit)
    assert newcomer.prompt_ids == [3]
    fifth.output(piece(newcomer.request, 0, [9], "x", "stop"))
    assert node.client.receive()["items"][0][0] == 3


def _on_trial(node: _Node) -> tuple[FakeGroup, Submit]:
    """Two requests of the only group, which dies twice: the one that is tried alone then."""
    for number in (1, 2):
        node.client.send(type="generate", id=number, prompt_ids=[number], params={"max_tokens": 99})
        node.groups[0].expect(Submit)
    for incarnation in (1, 2):
        node.kill(0, incarnation - 1)
        group = node.near.group(0, incarnation=incarnation)
        tried: Submit = group.expect(Submit)
    return group, tried


def test_a_trial_is_over_after_some_tokens(start: Start) -> None:
    node = _Node(start, groups=1)
    group, tried = _on_trial(node)
    group.output(piece(tried.request, 0, list(range(TRIAL_TOKENS)), "x"))
    assert group.expect(Credit)
    assert group.expect(Submit).prompt_ids == [2]


def test_a_planned_end_is_not_charged(start: Start) -> None:
    node = _Node(start, groups=1)
    node.ask()
    for incarnation in range(1, 6):
        node.supervisor.send(GroupDown(0, incarnation - 1, "on request", planned=True))
        group = node.near.group(0, incarnation=incarnation)
        again = group.expect(Submit)
    group.output(piece(again.request, 0, [9], "x", "stop"))
    assert node.client.receive()["items"][0][4][0] == "stop"


def test_a_trial_that_is_ended_on_request_is_made_again(start: Start) -> None:
    node = _Node(start, groups=1)
    _on_trial(node)
    node.supervisor.send(GroupDown(0, 2, "on request", planned=True))
    group = node.near.group(0, incarnation=3)
    again = group.expect(Submit)
    group.output(piece(again.request, 0, list(range(TRIAL_TOKENS)), "x"))
    assert group.expect(Credit)
    assert {again.prompt_ids[0], group.expect(Submit).prompt_ids[0]} == {1, 2}


def test_a_stream_can_be_cancelled_wherever_it_is(start: Start) -> None:
    node = _Node(start)
    node.ask()
    node.kill(0)
    again = node.groups[1].expect(Submit)
    node.client.send(type="cancel", id=1)
    assert node.client.receive()["items"][0][4][0] == "cancelled"
    assert node.groups[1].expect(Abort).request == again.request
    node = _Node(start, groups=1)
    node.ask()
    node.kill(0)
    wait_for_states(node.client, "restarting")
    node.client.send(type="cancel", id=1)
    assert node.client.receive()["items"][0][4][0] == "cancelled"
    assert node.requests()["in_flight"] == 0


def test_answers_of_one_request_that_are_on_both_groups(start: Start) -> None:
    node = _Node(start)
    node.client.send(type="generate", id=1, prompt_ids=[5], params={"n": 2, "seed": 8})
    one, other = (group.expect(Submit) for group in node.groups)
    node.kill(0)
    again = node.groups[1].expect(Submit)
    assert again.seed == one.seed != other.seed
    pieces = piece(other.request, 0, [1], "a", "stop"), piece(again.request, 0, [2], "b", "stop")
    node.groups[1].output(*pieces)
    assert [(item[3], item[5]) for item in node.client.receive()["items"]] == [("a", 1), ("b", 0)]
    assert node.groups[1].expect(Credit)


def test_prompt_logprobs_are_not_repeated(start: Start) -> None:
    node = _Node(start)
    first = node.ask(prompt_logprobs=0)
    found = [Logprobs(TokenLogprob(token, -1.0, 1, b""), []) for token in (6, 7)]
    node.groups[0].output(Piece(first.request, 0, [], "", None, None, found[:1]))
    assert [each[0][0] for each in node.client.receive()["items"][0][7]] == [6]
    node.kill(0)
    again = node.groups[1].expect(Submit)
    assert again.prompt_logprobs == 0
    node.groups[1].output(Piece(again.request, 0, [11], "a", None, None, found))
    assert [each[0][0] for each in node.client.receive()["items"][0][7]] == [7]
    node.kill(1)
    third = node.near.group(0, incarnation=1).expect(Submit)
    assert third.prompt_logprobs == -1 and third.resumed == 1


def test_how_long_streams_wait_for_another_group_is_told(start: Start) -> None:
    node = _Node(start)
    node.ask()
    before = time.monotonic()
    node.supervisor.send(GroupDown(0, 0, "its worker was killed", detected=before - 2.0))
    node.groups[1].expect(Submit)
    node.client.send(type="status", id=2)
    told = node.client.receive()["status"]["readmission_ms"]
    assert told["count"] == 1
    assert 2000 <= told["p50"] == told["p99"] == told["max"] < (time.monotonic() - before + 2) * 1e3
