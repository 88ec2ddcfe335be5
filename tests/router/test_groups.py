"""Which group a request goes to, and what happens when groups come and go."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from albireo.ipc.messages import (
    Credit,
    GroupDown,
    GroupStats,
    Reset,
    SchedulerStats,
    Submit,
)
from albireo.router import actors
from albireo.router.hub import AsyncHub

from .conftest import Neighbourhood
from .fakes import FakeGroup, RawClient, piece

Start = Callable[..., Neighbourhood]


def generate(client: RawClient, number: int, max_tokens: int = 16) -> None:
    client.send(type="generate", id=number, prompt_ids=[5], params={"max_tokens": max_tokens})


def in_flight(client: RawClient) -> list[tuple[str, int, int]]:
    """State, requests and outstanding tokens of each group."""
    client.send(type="status", id=10_000)
    groups = client.receive()["status"]["groups"]
    return [(each["state"], each["in_flight"], each["outstanding_tokens"]) for each in groups]


def test_the_group_with_the_fewest_outstanding_tokens_is_chosen(start: Start) -> None:
    near = start(num_groups=2)
    groups = [near.group(0), near.group(1)]
    client = near.client()
    wait_for_states(client, "ready", "ready")
    generate(client, 1, max_tokens=99)
    first = groups[0].expect(Submit).request
    generate(client, 2, max_tokens=9)
    generate(client, 3, max_tokens=9)
    assert [groups[1].expect(Submit).max_tokens for _ in range(2)] == [9, 9]
    assert in_flight(client) == [("ready", 1, 100), ("ready", 2, 20)]
    groups[0].output(piece(first, 0, [1] * 90, ""))
    client.receive()
    assert in_flight(client)[0] == ("ready", 1, 10)
    generate(client, 4)
    assert groups[0].expect(Credit) and groups[0].expect(Submit).max_tokens == 16
    groups[0].output(piece(first, 90, [1], "", "stop"))
    client.receive()
    assert in_flight(client) == [("ready", 1, 17), ("ready", 2, 20)]


def test_a_full_node_says_so_with_the_numbers(start: Start) -> None:
    near = start(num_groups=2, max_num_seqs=2, max_num_queued_reqs=1)
    groups = [near.group(0), near.group(1)]
    client = near.client()
    wait_for_states(client, "ready", "ready")
    for number in range(7):
        generate(client, number)
    error = client.expect_error("queue_full", 6)
    assert error["retry"]
    assert (
        "6 answers" in error["message"] and "2 groups x (2 running + 1 queued)" in error["message"]
    )
    request = groups[0].expect(Submit).request
    groups[0].output(piece(request, 0, [1], "a", "stop"))
    client.receive()
    generate(client, 8)
    client.send(type="models", id=9)
    assert client.receive()["type"] == "model_list"


def test_a_client_that_fills_the_node_leaves_room_for_others(start: Start) -> None:
    """Of 128 an eighth more, two for each: by one request of two answers, or by two."""
    near = start(max_num_seqs=64, max_num_queued_reqs=64)
    group = near.group()
    flood, *others = (near.client() for _ in range(10))
    wait_for_states(flood, "ready")
    for number in range(129):
        generate(flood, number)
    assert "128 answers" in flood.expect_error("queue_full", 128)["message"]
    for other in others[:8]:
        generate(other, 1)
        generate(other, 2)
        generate(other, 3)
        assert "the node takes 128 (" in other.expect_error("queue_full", 3)["message"]
    generate(others[8], 1)
    error = others[8].expect_error("queue_full", 1)
    assert "144 answers" in error["message"] and "+ 16 of clients with few" in error["message"]
    first = [group.expect(Submit).request for _ in range(128)]
    assert group.silent()
    group.output(*(piece(request, 0, [1], "a", "stop") for request in first[:16]))
    assert isinstance(group.next(), Credit)
    assert len({group.expect(Submit).request for _ in range(16)} - set(first)) == 16


def test_requests_wait_for_a_group_that_is_starting(start: Start) -> None:
    near = start(max_num_seqs=1, max_num_queued_reqs=2)
    client = near.client()
    for number in range(4):
        generate(client, number)
    error = client.expect_error("queue_full", 3)
    assert error["retry"] and "no group is ready yet" in error["message"]
    group = near.group()
    requests = [group.expect(Submit).request for _ in range(3)]
    assert requests == sorted(requests)
    group.output(*(piece(request, 0, [1], "a", "stop") for request in requests))
    assert [item[0] for item in client.receive()["items"]] == [0, 1, 2]


def test_a_dead_group_fails_its_requests_and_no_others(start: Start) -> None:
    near = start(num_groups=2)
    groups = [near.group(0), near.group(1)]
    supervisor = near.supervisor()
    client = near.client()
    wait_for_states(client, "ready", "ready")
    generate(client, 1)
    generate(client, 2)
    groups[0].expect(Submit)
    survivor = groups[1].expect(Submit).request
    supervisor.send(GroupDown(0, 0, "g0.worker0 was killed by signal 9"))
    error = client.expect_error("group_failed", 1)
    assert error["retry"] and "signal 9" in error["message"]
    groups[1].output(piece(survivor, 0, [3], "a", "stop"))
    assert client.receive()["items"][0][0] == 2
    assert [state for state, _, _ in in_flight(client)] == ["restarting", "ready"]
    generate(client, 3)
    assert groups[1].expect(Credit) and groups[1].expect(Submit)


def test_what_an_old_incarnation_says_is_ignored(start: Start) -> None:
    near = start()
    old = near.group()
    supervisor = near.supervisor()
    client = near.client()
    wait_for_states(client, "ready")
    generate(client, 1)
    dead = old.expect(Submit).request
    supervisor.send(GroupDown(0, 0, "it hung"))
    client.expect_error("group_failed", 1)
    new = near.group(incarnation=1)
    supervisor.topology("ready")
    wait_for_states(client, "ready")
    generate(client, 2)
    request = new.expect(Submit).request
    assert request != dead
    old.output(piece(request, 0, [9], "wrong"), piece(dead, 0, [9], "wrong"))
    old.join()
    supervisor.send(GroupDown(0, 0, "said twice"))
    assert old.silent()
    new.output(piece(request, 0, [3], "right", "stop"))
    assert client.receive()["items"][0][3] == "right"


def test_an_incarnation_that_died_before_it_joined_is_not_used(start: Start) -> None:
    near = start()
    supervisor = near.supervisor()
    client = near.client()
    supervisor.send(GroupDown(0, 4, "gone already"))
    wait_for_states(client, "restarting")
    generate(client, 1)
    assert near.group(incarnation=4).silent()
    assert near.group(incarnation=5).expect(Submit).max_tokens == 16


def test_a_new_incarnation_means_that_the_old_one_is_dead(start: Start) -> None:
    near = start()
    old = near.group()
    client = near.client()
    generate(client, 1)
    old.expect(Submit)
    new = near.group(incarnation=1)
    client.expect_error("group_failed", 1)
    generate(client, 2)
    assert new.expect(Submit)


def test_without_any_group_requests_are_refused_at_once(start: Start) -> None:
    near = start(num_groups=2)
    supervisor = near.supervisor()
    client = near.client()
    generate(client, 1)
    supervisor.topology("failed", "restarting")
    supervisor.topology("failed", "failed")
    error = client.expect_error("unavailable", 1)
    assert error["retry"] and "2 groups" in error["message"]
    generate(client, 2)
    client.expect_error("unavailable", 2)


def test_a_group_that_cannot_be_reached_is_passed_over(start: Start) -> None:
    near = start(num_groups=2)
    client = near.client()
    gone, there = near.group(0), near.group(1)
    wait_for_states(client, "ready", "ready")
    gone.close()
    time.sleep(0.2)  # What ZeroMQ needs to notice; until then the supervisor's word counts.
    for number in range(4):
        generate(client, number)
    for _ in range(4):
        there.expect(Submit)
    assert in_flight(client)[0][:2] == ("restarting", 0)


def test_a_group_that_can_be_reached_again_begins_anew(start: Start) -> None:
    """It is alive: what it had goes on, and is not suspected of anything."""
    near = start(max_failovers=0)
    group, client = near.group(), near.client()
    wait_for_states(client, "ready")
    generate(client, 1)
    group.output(piece(group.expect(Submit).request, 0, [11], "a"))
    assert client.receive()["items"][0][3] == "a"
    last = lose(group, client)
    group = near.group(join=False)
    assert group.expect(Reset)
    group.join()
    again = [first_submit(group), *(group.expect(Submit) for _ in range(last - 1))]
    assert (again[0].prompt_ids, again[0].resumed) == ([5, 11], 1)
    group.output(piece(again[0].request, 1, [12], "b", "stop"))
    assert client.receive()["items"][0][:4] == [1, 1, [12], "b"]
    assert in_flight(client)[0][:2] == ("ready", last - 1)


def test_a_credit_that_cannot_be_given(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    """The group begins anew: it would have one less for ever."""
    send, refused = AsyncHub.send, []

    def send_but_one(hub: AsyncHub, peer: bytes, message: Any) -> bool:
        if isinstance(message, Credit) and not refused:
            refused.append(message)
            return False
        return send(hub, peer, message)

    monkeypatch.setattr(AsyncHub, "send", send_but_one)
    near = start(max_failovers=0)
    group, client = near.group(), near.client()
    generate(client, 1)
    group.output(piece(group.expect(Submit).request, 0, [11], "a"))
    assert client.receive()["items"][0][3] == "a"
    assert group.expect(Reset)
    group.join()
    assert first_submit(group).resumed == 1


def test_a_group_that_was_given_up_is_used_when_it_can_be_reached_again(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(actors, "LOST_GROUP_TIMEOUT_S", 0.0)
    near = start(num_groups=2, max_failovers=3)
    gone, there = near.group(0), near.group(1)
    client = near.client()
    wait_for_states(client, "ready", "ready")
    generate(client, 1)
    gone.expect(Submit)
    last = lose(gone, client)
    for _ in range(last):
        there.expect(Submit)
    back = near.group(0, join=False)
    assert back.expect(Reset)
    back.join()
    wait_for_states(client, "ready", "ready")
    generate(client, last + 1)
    first_submit(back)
    assert [requests for _, requests, _ in in_flight(client)] == [1, last]


def test_a_group_that_ended_is_not_called_back(start: Start) -> None:
    near = start(max_failovers=3)
    group, supervisor, client = near.group(), near.supervisor(), near.client()
    wait_for_states(client, "ready")
    lose(group, client)
    supervisor.send(GroupDown(0, 0, "it hung"))
    supervisor.topology("starting")
    wait_for_states(client, "starting")
    old = near.group(join=False)
    old.join()
    assert old.silent(3 * actors.TICK_S)
    assert in_flight(client)[0][0] == "starting"


def test_a_restarted_router_resets_the_groups_that_were_there_before(start: Start) -> None:
    near = start(num_groups=2, incarnation=3)
    groups = [near.group(0, incarnation=2, join=False), near.group(1, incarnation=7)]
    supervisor = near.supervisor()
    client = near.client()
    generate(client, 1)
    request = groups[1].expect(Submit).request
    assert request == (3 << 24) + 1
    # What the group still sends for requests of the router before is nobody's.
    groups[0].output(piece((2 << 24) + 5, 0, [9], "wrong"), piece(request, 0, [9], "wrong"))
    supervisor.topology("ready", "ready", incarnations=[2, 7])
    assert isinstance(groups[0].next(), Reset)
    groups[0].join()
    wait_for_states(client, "ready", "ready")
    generate(client, 2)
    first_submit(groups[0])
    assert groups[1].silent()


def test_group_stats_are_in_the_status(start: Start) -> None:
    near = start()
    group = near.group()
    client = near.client()
    stats = SchedulerStats(3, 1, 8, 64, 0, 500, 1000, 4000, 12, 5.25, 4.5)
    group.send(GroupStats(0, stats))
    near.supervisor().topology("ready")
    wait_for_states(client, "ready")
    while True:
        client.send(type="status", id=1)
        status = client.receive()["status"]
        if status["actors"] and status["groups"][0]["scheduler"]:
            break
    scheduler = status["groups"][0]["scheduler"]
    assert scheduler["running"] == 3 and scheduler["kv_usage"] == 0.125
    assert scheduler["step_ms_mean"] == 5.25 and scheduler["generated_tokens"] == 4000
    assert status["node"] == "test" and status["model"]["id"] == "fake-model"
    assert status["actors"][0]["name"] == "tokenizer" and status["actors"][0]["group"] is None
    assert status["requests"]["in_flight"] == 0 and status["connections"] == 1


def lose(group: FakeGroup, client: RawClient) -> int:
    """Its link breaks, and the router finds out by what it says there: the last request's number.

    ZeroMQ takes a moment to notice; what is said meanwhile is lost.
    """
    group.close()
    number = 1
    while in_flight(client)[0][0] == "ready":
        number += 1
        generate(client, number)
        time.sleep(0.05)  # the node is full after 128
    return number


def first_submit(group: FakeGroup) -> Submit:
    """Behind any number of Resets, and of Credits for outputs, whose order to these is open."""
    while isinstance(message := group.next(), Reset | Credit):
        pass
    assert isinstance(message, Submit)
    return message


def wait_for_states(client: RawClient, *states: str) -> None:
    """Until the router sees the groups so; messages of different peers have no order."""
    while [state for state, _, _ in in_flight(client)] != list(states):
        pass
