"""Requests for several answers: a stream for each, one end for each, one error for all."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

from albireo.ipc.messages import Abort, Credit, Encoded, EncodeText, GroupDown, Piece, Submit
from albireo.ipc.protocol import Logprobs, TokenLogprob

from .conftest import Neighbourhood
from .fakes import FakeGroup, RawClient, piece
from .test_groups import wait_for_states

Start = Callable[..., Neighbourhood]


def ask(client: RawClient, group: FakeGroup, n: int, **params: Any) -> list[Submit]:
    client.send(type="generate", id=1, prompt_ids=[5, 6], params={"n": n, **params})
    return [group.expect(Submit) for _ in range(n)]


def test_the_welcome_names_the_form_of_tool_calls(start: Start) -> None:
    client = start().client(hello=False)
    client.send(type="hello", protocol=1)
    assert client.receive()["tool_style"] == "llama"


def test_each_answer_has_its_seed_and_one_scores_the_prompt(start: Start) -> None:
    near = start()
    group, client = near.group(), near.client()
    found = ask(client, group, 3, seed=2**64 - 2, logprobs=2, prompt_logprobs=0)
    assert [each.seed for each in found] == [-2, -1, 0]
    assert [each.logprobs for each in found] == [2, 2, 2]
    assert [each.prompt_logprobs for each in found] == [0, -1, -1]
    assert len({each.request for each in found}) == 3


def test_the_request_goes_on_until_all_answers_have_ended(start: Start) -> None:
    near = start()
    group, client = near.group(), near.client()
    zero, one = (each.request for each in ask(client, group, 2))
    group.output(piece(one, 0, [7], "a"), piece(zero, 0, [8], "b", "stop"))
    items = client.receive()["items"]
    assert [(item[:4], item[5]) for item in items] == [([1, 0, [7], "a"], 1), ([1, 0, [8], "b"], 0)]
    client.send(type="generate", id=1, prompt_ids=[5])
    assert "in use" in client.expect_error("invalid_request", None)["message"]
    group.output(piece(one, 1, [9], "c", "length"))
    item = client.receive()["items"][0]
    assert item[4][0] == "length" and item[5] == 1
    assert group.expect(Credit) and group.expect(Credit)
    client.send(type="generate", id=1, prompt_ids=[5])
    assert isinstance(group.next(), Submit)


def test_logprobs_reach_the_client(start: Start) -> None:
    near = start()
    group, client = near.group(), near.client()
    (submit,) = ask(client, group, 1, logprobs=1, prompt_logprobs=1)
    found = [Logprobs(TokenLogprob(7, -0.5, 2, b"x"), [TokenLogprob(8, -0.25, 1, b"\xff")])]
    group.output(Piece(submit.request, 0, [7], "x", None, found, found))
    item = client.receive()["items"][0]
    assert item[6] == item[7] == [[[7, -0.5, 2, b"x"], [[8, -0.25, 1, b"\xff"]]]]


def test_cancel_ends_every_answer(start: Start) -> None:
    near = start()
    group, client = near.group(), near.client()
    submits = ask(client, group, 3)
    group.output(piece(submits[1].request, 0, [7], "a", "stop"))
    assert client.receive()["items"][0][5] == 1
    client.send(type="cancel", id=1)
    items = client.receive()["items"]
    assert [(item[4][0], item[5]) for item in items] == [("cancelled", 0), ("cancelled", 2)]
    assert group.expect(Credit)
    aborted = {group.expect(Abort).request for _ in range(2)}
    assert aborted == {submits[0].request, submits[2].request}


def test_one_error_ends_them_all(start: Start) -> None:
    near = start()
    group, client = near.group(), near.client()
    zero, one = (each.request for each in ask(client, group, 2))
    group.output(piece(one, 3, [7], "a"))
    client.expect_error("internal", 1)
    assert group.expect(Credit)
    assert {group.expect(Abort).request for _ in range(2)} == {zero, one}
    client.send(type="status", id=2)
    requests = client.receive()["status"]["requests"]
    assert (requests["in_flight"], requests["failed"]) == (0, 2)


def test_a_group_that_dies_is_one_error(start: Start) -> None:
    near = start()
    supervisor = near.supervisor()
    group, client = near.group(), near.client()
    ask(client, group, 2)
    supervisor.send(GroupDown(0, 0, "killed"))
    client.expect_error("group_failed", 1)
    client.send(type="status", id=2)
    assert client.receive()["type"] == "node_status"


def test_more_answers_than_the_node_takes_are_refused(start: Start) -> None:
    """For now where they would fit once others have ended, and else for good; a group that starts
    is soon to run what it is given."""
    near = start(num_groups=2, max_num_seqs=2, max_num_queued_reqs=1)
    near.group()
    client = near.client()
    wait_for_states(client, "ready", "starting")
    client.send(type="generate", id=1, prompt_ids=[5], params={"n": 4})
    client.send(type="generate", id=2, prompt_ids=[5], params={"n": 3})
    error = client.expect_error("queue_full", 2)
    assert error["retry"]
    assert "asks for 3" in error["message"] and "takes 6" in error["message"]
    client.send(type="generate", id=2, prompt_ids=[5], params={"n": 7})
    error = client.expect_error("invalid_request", 2)
    assert not error["retry"] and error["param"] == "n"
    assert "asks for 7" in error["message"] and "takes 6 (2 groups x (2 " in error["message"]


def test_bad_words_go_through_the_tokenizer(start: Start) -> None:
    near = start()
    tokenizer = near.tokenizer()
    group, client = near.group(), near.client()
    client.send(type="generate", id=1, prompt_ids=[5], params={"bad_words": ["no", "never"]})
    asked = tokenizer.expect(EncodeText)
    assert asked.words == ("no", "never")
    tokenizer.send(Encoded(asked.key, [], ((3,), (4, 5))))
    submit = group.expect(Submit)
    assert submit.prompt_ids == [5] and submit.bad_words == ((3,), (4, 5))


def test_a_bad_word_of_too_many_tokens_is_refused(start: Start) -> None:
    near = start()
    tokenizer = near.tokenizer()
    near.group()
    client = near.client()
    client.send(type="generate", id=1, prompt="x", params={"bad_words": ["no"]})
    asked = tokenizer.expect(EncodeText)
    tokenizer.send(Encoded(asked.key, [5], ((3,) * 17,)))
    error = client.expect_error("invalid_request", 1)
    assert error["param"] == "bad_words" and "17 tokens; 16" in error["message"]


def test_a_node_with_a_seed_draws_the_same_ones_again(start: Start) -> None:
    lives = itertools.count()  # an older group must not be taken for the one that is asked

    def drawn(**spec: Any) -> list[int]:
        near = start(**spec)
        group, client = near.group(incarnation=next(lives)), near.client()
        found = ask(client, group, 2)
        client.send(type="generate", id=2, prompt_ids=[5])
        found.append(group.expect(Submit))
        near.router.stop()
        return [each.seed for each in found]

    first, again, chance = drawn(seed=5), drawn(seed=5), drawn()
    assert first == again and first[1] == first[0] + 1 and first[2] not in first[:2]
    assert chance != first
