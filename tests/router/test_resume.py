"""Requests whose connection is over wait for their session's next one."""

from __future__ import annotations

import time
from typing import Any

import pytest

from albireo.ipc.messages import Abort, GroupDown, Piece
from albireo.ipc.protocol import Logprobs, TokenLogprob

from .fakes import piece
from .sessions import SESSION, Start, ask, counts, join, submit


def test_a_request_goes_on_behind_what_the_client_has(start: Start) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    client = join(near)
    ask(client, stop=["x"], min_tokens=3, logprobs=0)
    first = submit(group)
    group.output(piece(first.request, 0, [11, 12, 13], "abc"))
    assert client.receive()["items"][0][:4] == [1, 0, [11, 12, 13], "abc"]
    client.close()
    while not isinstance(group.next(), Abort):
        pass  # nothing is computed for a client that is not there
    client = join(near)
    assert counts(client)["waiting_for_client"] == 1 and counts(client)["in_flight"] == 0
    client.send(type="resume", id=1, have=[[0, 2]])
    again = submit(group)
    assert (again.prompt_ids, again.resumed) == ([5, 6, 7, 11, 12], 2)
    assert again.request != first.request
    for name in ("max_tokens", "min_tokens", "seed", "stop", "stop_token_ids", "logprobs"):
        assert getattr(again, name) == getattr(first, name)
    group.output(piece(again.request, 2, [13, 14], "cd", "length", prompt=3))
    assert client.receive()["items"][0][:5] == [1, 2, [13, 14], "cd", ["length", None, 3, 4]]
    after = counts(client)
    assert (after["resumed"], after["finished"], after["cancelled"]) == (1, 1, 0)
    assert (after["waiting_for_client"], after["in_flight"]) == (0, 0)


def test_nobody_else_can_claim_it_and_nobody_twice(start: Start) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    client = join(near)
    ask(client)
    request = submit(group).request
    group.output(piece(request, 0, [11], "a"))
    client.receive()
    client.close()
    other = join(near, SESSION[:-1] + "S")
    anonymous = near.client()
    for each in (other, anonymous):
        each.send(type="resume", id=1, have=[[0, 1]])
        assert each.expect_error("lost", 1)["retry"]
    client = join(near)
    client.send(type="resume", id=1, have=[[0, 1]])
    submit(group)
    client.send(type="resume", id=1, have=[[0, 1]])
    assert "in use" in client.expect_error("invalid_request", None)["message"]


def test_who_comes_too_late_has_lost_it(start: Start) -> None:
    near = start(resume_s=0.05)
    group = near.group()
    client = join(near)
    ask(client)
    request = submit(group).request
    group.output(piece(request, 0, [11], "a"))
    client.receive()
    client.close()
    client = join(near)
    deadline = time.monotonic() + 5
    while counts(client)["waiting_for_client"]:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    client.send(type="resume", id=1, have=[[0, 1]])
    assert "no record" in client.expect_error("lost", 1)["message"]


def test_a_node_that_does_not_keep_requests_says_so(start: Start) -> None:
    near = start()
    group = near.group()
    client = join(near)
    ask(client)
    submit(group)
    client.close()
    while not isinstance(group.next(), Abort):
        pass
    client = join(near)
    assert counts(client)["cancelled"] == 1
    client.send(type="resume", id=1, have=[[0, 0]])
    client.expect_error("lost", 1)


@pytest.mark.parametrize(
    ("have", "code", "says"),
    [
        ([[0, 2]], "lost", "knows 1 tokens of this answer, and the client has 2"),
        ([[1, 0]], "lost", "no record of answer 1"),
        ([[0, -1]], "lost", "-1"),
        ([], "invalid_request", "once"),
        ([[0, 1], [0, 1]], "invalid_request", "once"),
        ([[0, 1, 9]], "invalid_request", "3 tokens, not 9"),
        ([[0, "x"]], "invalid_request", "not valid"),
    ],
)
def test_claims_that_cannot_be(start: Start, have: list[Any], code: str, says: str) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    client = join(near)
    ask(client)
    request = submit(group).request
    group.output(piece(request, 0, [11], "a"))
    client.receive()
    client.close()
    client = join(near)
    client.send(type="resume", id=1, have=have)
    assert says in client.expect_error(code, 1)["message"]
    client.send(type="models", id=2)
    assert client.receive()["type"] == "model_list"


def test_a_new_connection_takes_over_from_one_that_seems_alive(start: Start) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    old = join(near)
    ask(old)
    request = submit(group).request
    group.output(piece(request, 0, [11], "a"))
    old.receive()
    new = join(near)
    old.expect_close()
    new.send(type="resume", id=1, have=[[0, 1]])
    assert submit(group).prompt_ids == [5, 6, 7, 11]
    assert counts(new)["waiting_for_client"] == 0


def test_an_end_that_was_sent_and_did_not_come(start: Start) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    client = join(near)
    ask(client)
    request = submit(group).request
    group.output(piece(request, 0, [11, 12], "ab"))
    assert client.receive()["items"][0][2] == [11, 12]
    group.output(piece(request, 2, [13], "c", "stop", prompt=3))
    group.next(), group.next()  # both credits: the router has sent it
    client.close()
    client = join(near)
    assert counts(client)["waiting_for_client"] == 0
    client.send(type="resume", id=1, have=[[0, 2]])
    again = submit(group)
    assert (again.prompt_ids, again.resumed) == ([5, 6, 7, 11, 12], 2)
    group.output(piece(again.request, 2, [13], "c", "stop", prompt=3))
    assert client.receive_deltas(1)[0][:4] == [1, 2, [13], "c"]
    client.send(type="resume", id=2, have=[[0, 0]])
    client.expect_error("lost", 2)


def test_ends_are_not_known_for_ever(start: Start) -> None:
    near = start(resume_s=0.3)
    group = near.group()
    client = join(near)
    ask(client)
    group.output(piece(submit(group).request, 0, [11], "a", "stop"))
    client.receive_deltas(1)
    time.sleep(0.8)
    client.close()
    client = join(near)
    client.send(type="resume", id=1, have=[[0, 0]])
    client.expect_error("lost", 1)


def test_several_answers_of_which_one_has_ended(start: Start) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    client = join(near)
    ask(client, n=3, seed=8)
    one, two, three = (submit(group) for _ in range(3))
    group.output(
        piece(one.request, 0, [11], "a"), piece(two.request, 0, [21], "b", "stop"),
        piece(three.request, 0, [31, 32], "cd"),
    )  # fmt: skip
    assert len(client.receive()["items"]) == 3
    client.close()
    client = join(near)
    client.send(type="resume", id=1, have=[[2, 1], [0, 0]])
    again = sorted((submit(group) for _ in range(2)), key=lambda each: each.seed)
    assert [each.prompt_ids for each in again] == [[5, 6, 7], [5, 6, 7, 31]]
    assert [each.seed for each in again] == [one.seed, three.seed]
    group.output(piece(again[0].request, 0, [11], "a", "stop"))
    assert client.receive()["items"][0][5] == 0
    group.output(piece(again[1].request, 1, [32], "d", "stop"))
    assert client.receive()["items"][0][1:6] == [1, [32], "d", ["stop", None, 1, 2], 2]
    assert counts(client)["in_flight"] == 0


def test_prompt_logprobs_are_not_repeated(start: Start) -> None:
    near = start(resume_s=5.0)
    group = near.group()
    client = join(near)
    ask(client, prompt_logprobs=0)
    found = [Logprobs(TokenLogprob(token, -1.0, 1, b""), []) for token in (6, 7)]
    group.output(Piece(submit(group).request, 0, [], "", None, None, found[:1]))
    client.receive()
    client.close()
    client = join(near)
    client.send(type="resume", id=1, have=[[0, 0, 1]])
    again = submit(group)
    assert again.prompt_logprobs == 0
    group.output(Piece(again.request, 0, [11], "a", None, None, found))
    assert [each[0][0] for each in client.receive()["items"][0][7]] == [7]


def test_its_group_may_die_as_well(start: Start) -> None:
    near = start(resume_s=5.0, max_failovers=2)
    group = near.group()
    supervisor = near.supervisor()
    client = join(near)
    ask(client)
    group.output(piece(submit(group).request, 0, [11], "a"))
    client.receive()
    client.close()
    client = join(near)
    client.send(type="resume", id=1, have=[[0, 1]])
    again = submit(group)
    group.output(piece(again.request, 1, [12], "b"))
    client.receive()
    supervisor.send(GroupDown(0, 0, "it was killed"))
    third = submit(near.group(0, incarnation=1))
    assert (third.prompt_ids, third.resumed) == ([5, 6, 7, 11, 12], 2)


def test_a_session_s_name_must_not_be_guessable(start: Start) -> None:
    near = start(resume_s=5.0)
    for name in ("short", "x" * 129):
        client = near.client(hello=False)
        client.send(type="hello", protocol=1, session=name)
        assert "22 to 128" in client.expect_error("protocol", None)["message"]
