"""Requests that wait for their client keep their places; those that had ended need one."""

from __future__ import annotations

from typing import Any

from albireo.ipc.config import TenantConfig

from .fakes import FakeGroup, RawClient, piece
from .sessions import SESSION, Start, ask, counts, join, submit

BOUNDED: dict[str, Any] = {"resume_s": 10.0, "max_num_seqs": 1, "max_num_queued_reqs": 1}


def have_ended(group: FakeGroup, client: RawClient, requests: int) -> None:
    """Requests from 1 on are asked and answered, one after the other."""
    for number in range(1, requests + 1):
        ask(client, number)
        group.output(piece(submit(group).request, 0, [11], "a", "stop", prompt=3))
        client.receive_deltas(number)


def test_what_has_ended_needs_a_place_to_be_computed_again(start: Start) -> None:
    """Else one session could have all it ever asked computed at once, again and again."""
    near = start(**BOUNDED)
    group = near.group()
    client = join(near)
    have_ended(group, client, 5)
    for number in range(1, 4):
        client.send(type="resume", id=number, have=[[0, 0]])
    error = client.expect_error("lost", 3)
    assert error["retry"] and "2 answers are in flight" in error["message"]
    assert counts(client)["in_flight"] == 2
    first = submit(group).request
    group.output(piece(first, 0, [11], "a", "stop", prompt=3))
    client.receive_deltas(1)
    client.send(type="resume", id=4, have=[[0, 0]])
    assert counts(client)["in_flight"] == 2


def test_what_has_ended_takes_no_place_that_is_for_those_with_few(start: Start) -> None:
    near = start(resume_s=10.0, max_num_seqs=32, max_num_queued_reqs=32)
    group = near.group()
    client = join(near)
    have_ended(group, client, 70)
    for number in range(1, 71):
        client.send(type="resume", id=number, have=[[0, 0]])
    for number in range(65, 71):
        client.expect_error("lost", number)
    assert counts(client)["in_flight"] == 64
    other = near.client()
    ask(other)
    assert counts(other)["in_flight"] == 65


def test_places_are_kept_for_those_who_are_away(start: Start) -> None:
    near = start(**BOUNDED, tenants=TenantConfig(max_num_reqs=1))
    group = near.group()
    client = near.client(hello=False)
    client.send(type="hello", protocol=1, session=SESSION)
    client.receive()
    ask(client, 1, tenant="ann")
    group.output(piece(submit(group).request, 0, [11], "a"))
    client.receive()
    client.close()
    client = join(near)
    assert counts(client)["waiting_for_client"] == 1
    ask(client, 2, tenant="ann")
    assert "this client" in client.expect_error("queue_full", 2)["message"]
    ask(client, 3, tenant="bob")
    submit(group)
    ask(client, 4, tenant="cid")
    assert "2 answers are in flight" in client.expect_error("queue_full", 4)["message"]
    client.send(type="resume", id=1, have=[[0, 1]])
    assert submit(group).prompt_ids == [5, 6, 7, 11]
    assert counts(client)["in_flight"] == 2


def test_what_is_lost_keeps_no_place(start: Start) -> None:
    near = start(**BOUNDED, tenants=TenantConfig(max_num_reqs=1))
    group = near.group()
    client = join(near)
    ask(client, 1, tenant="ann")
    submit(group)
    client.close()
    client = join(near)
    client.send(type="resume", id=1, have=[[0, 5]])
    client.expect_error("lost", 1)
    assert counts(client)["waiting_for_client"] == 0
    ask(client, 2, tenant="ann")
    submit(group)


def test_who_asks_again_gets_the_place_of_what_was_asked_before(start: Start) -> None:
    near = start(**BOUNDED, tenants=TenantConfig(max_num_reqs=1))
    group = near.group()
    for _ in range(3):
        client = join(near)
        ask(client, 1, tenant="ann")
        submit(group)
        client.close()
    client = join(near)
    ask(client, 1, tenant="ann")
    group.output(piece(submit(group).request, 0, [11], "a", "stop"))
    client.receive_deltas(1)
    assert counts(client)["waiting_for_client"] == 0
