"""The life of a stream: submitted, its tokens handed on, ended in one of the ways there are."""

from __future__ import annotations

from collections.abc import Callable

from albireo.ipc.messages import (
    Abort,
    Credit,
    EncodeChat,
    Encoded,
    EncodeText,
    Refused,
    Submit,
    TextFailed,
)

from .conftest import Neighbourhood
from .fakes import CONTEXT, EOS, RawClient, piece

Start = Callable[..., Neighbourhood]


def test_a_submit_has_every_value_resolved(start: Start) -> None:
    near = start()
    group = near.group()
    client = near.client()
    client.send(type="generate", id=1, prompt_ids=[5, 6])
    submit = group.expect(Submit)
    assert submit.request > 0 and submit.prompt_ids == [5, 6]
    assert (submit.max_tokens, submit.min_tokens) == (16, 0)
    assert submit.stop_token_ids == (EOS,)
    client.send(
        type="generate",
        id=2,
        prompt_ids=[5],
        params={
            "max_tokens": 3,
            "temperature": 0.5,
            "top_k": 100_000,
            "seed": 2**64 - 1,
            "stop": ["a", "b"],
            "stop_token_ids": [7],
            "ignore_eos": True,
            "include_stop_str_in_output": True,
        },
    )
    submit = group.expect(Submit)
    assert submit.seed == -1 and submit.stop_token_ids == (7,) and submit.stop == ("a", "b")
    assert submit.top_k == 0 and submit.temperature == 0.5 and submit.include_stop


def test_seeds_are_chosen_at_random_where_none_is_given(start: Start) -> None:
    near = start()
    group = near.group()
    client = near.client()
    for number in range(4):
        client.send(type="generate", id=number, prompt_ids=[5])
    assert len({group.expect(Submit).seed for _ in range(4)}) == 4


def heads(client: RawClient) -> list[list[object]]:
    """The next frame's items without what a plain request has no use for."""
    return [item[:5] for item in client.receive()["items"]]


def test_max_tokens_that_are_not_asked_are_cut_to_what_is_left(start: Start) -> None:
    near = start()
    group = near.group()
    tokenizer = near.tokenizer()
    client = near.client()
    client.send(type="generate", id=1, prompt_ids=[5] * (CONTEXT - 3))
    assert group.expect(Submit).max_tokens == 3
    client.send(type="chat", id=2, messages=[{"role": "user", "content": "hi"}])
    tokenizer.send(Encoded(tokenizer.expect(EncodeChat).key, [5] * 28))
    assert group.expect(Submit).max_tokens == CONTEXT - 28


def test_text_goes_through_the_tokenizer(start: Start) -> None:
    near = start()
    group = near.group()
    tokenizer = near.tokenizer()
    client = near.client()
    client.send(type="generate", id=1, prompt="hello")
    message = tokenizer.expect(EncodeText)
    assert message.text == "hello" and message.add_special_tokens
    tokenizer.send(Encoded(message.key, [11, 12]))
    assert group.expect(Submit).prompt_ids == [11, 12]
    client.send(type="generate", id=2, prompt="long")
    tokenizer.send(Encoded(tokenizer.expect(EncodeText).key, [1] * 4000))
    assert "4000" in client.expect_error("too_long", 2)["message"]
    client.send(type="chat", id=3, messages=[{"role": "?", "content": "hi"}])
    key = tokenizer.expect(EncodeChat).key
    tokenizer.send(TextFailed(key, "invalid_request", "the template knows no role '?'"))
    assert "no role" in client.expect_error("invalid_request", 3)["message"]


def test_who_asks_and_how_urgently_goes_to_the_group(start: Start) -> None:
    near = start()
    group = near.group()
    one, other = near.client(), near.client()
    one.send(type="generate", id=1, prompt_ids=[5], priority=-2, tenant="t", cache_salt="s")
    submit = group.expect(Submit)
    assert (submit.priority, submit.tenant, submit.cache_salt) == (-2, "t", "s")
    tenants = set()
    for client in (one, other):
        client.send(type="generate", id=2, prompt_ids=[5])
        tenants.add(group.expect(Submit).tenant)
    assert len(tenants) == 2 and "" not in tenants


def test_a_batch_becomes_one_frame_for_each_client_and_its_credit_comes_back(start: Start) -> None:
    near = start()
    group = near.group()
    clients = [near.client(), near.client()]
    requests = []
    for client in clients:
        for number in (1, 2):
            client.send(type="generate", id=number, prompt_ids=[5])
            requests.append(group.expect(Submit).request)
    for index in range(3):
        group.output(*(piece(request, index, [index], f"t{index} ") for request in requests))
        assert group.expect(Credit) == Credit(1)
        for client in clients:
            expected = [[number, index, [index], f"t{index} ", None] for number in (1, 2)]
            assert heads(client) == expected


def test_the_end_says_why_and_counts(start: Start) -> None:
    near = start()
    group = near.group()
    client = near.client()
    client.send(type="generate", id=1, prompt_ids=[5])
    request = group.expect(Submit).request
    group.output(piece(request, 0, [7, 8], "ab", "stop", prompt=1))
    assert [item[:5] for item in client.receive()["items"]] == [
        [1, 0, [7, 8], "ab", ["stop", None, 1, 2]]
    ]
    # The id can be used again.
    client.send(type="generate", id=1, prompt_ids=[5])
    assert group.expect(Credit) and group.expect(Submit).request != request


def test_a_gap_or_a_repeat_fails_the_request_and_only_it(start: Start) -> None:
    near = start()
    group = near.group()
    client = near.client()
    requests = []
    for number in (1, 2, 3):
        client.send(type="generate", id=number, prompt_ids=[5])
        requests.append(group.expect(Submit).request)
    one, two, three = requests
    group.output(*(piece(request, 0, [9], "a") for request in requests))
    assert len(client.receive()["items"]) == 3
    group.output(piece(one, 2, [9], "a"), piece(two, 0, [9], "a"), piece(three, 1, [9], "a"))
    assert heads(client) == [[3, 1, [9], "a", None]]
    assert "gap" in client.expect_error("internal", 1)["message"]
    client.expect_error("internal", 2)
    assert group.expect(Credit) and group.expect(Credit)
    assert {group.expect(Abort).request, group.expect(Abort).request} == {one, two}
    group.output(piece(one, 1, [9], "late"), piece(three, 2, [9], "b", "length"))
    assert client.receive()["items"][0][:4] == [3, 2, [9], "b"]


def test_cancel_is_answered_and_aborts(start: Start) -> None:
    near = start()
    group = near.group()
    client = near.client()
    client.send(type="generate", id=1, prompt_ids=[5, 6, 7])
    request = group.expect(Submit).request
    group.output(piece(request, 0, [9, 9], "ab"))
    client.receive()
    client.send(type="cancel", id=1)
    assert [item[:5] for item in client.receive()["items"]] == [
        [1, 2, [], "", ["cancelled", None, 3, 2]]
    ]
    assert group.expect(Credit) and group.expect(Abort).request == request
    group.output(piece(request, 2, [9], "c"))
    client.send(type="cancel", id=1)
    client.send(type="cancel", id=55)
    client.send(type="models", id=2)
    assert client.receive()["type"] == "model_list"


def test_cancel_reaches_a_request_in_every_stage(start: Start) -> None:
    near = start()
    tokenizer = near.tokenizer()
    client = near.client()
    client.send(type="generate", id=1, prompt="with the tokenizer")
    key = tokenizer.expect(EncodeText).key
    client.send(type="cancel", id=1)
    assert [item[:5] for item in client.receive()["items"]] == [
        [1, 0, [], "", ["cancelled", None, 0, 0]]
    ]
    tokenizer.send(Encoded(key, [5]))
    client.send(type="generate", id=2, prompt_ids=[5])
    client.send(type="cancel", id=2)
    assert [item[:5] for item in client.receive()["items"]] == [
        [2, 0, [], "", ["cancelled", None, 1, 0]]
    ]
    assert near.group().silent()


def test_a_client_that_goes_takes_its_requests_with_it(start: Start) -> None:
    near = start(num_groups=2)
    groups = [near.group(0), near.group(1)]
    leaver, stayer = near.client(), near.client()
    stayer.send(type="generate", id=1, prompt_ids=[5])
    kept = groups[0].expect(Submit).request
    leaver.send(type="generate", id=1, prompt_ids=[5])
    leaver.send(type="generate", id=2, prompt_ids=[5])
    gone = [(groups[1], groups[1].expect(Submit).request)]
    gone.append((groups[0], groups[0].expect(Submit).request))
    leaver.close()
    for group, request in gone:
        assert group.expect(Abort).request == request
    groups[0].output(piece(kept, 0, [9], "a", "stop"), piece(gone[1][1], 0, [9], "a"))
    assert stayer.receive_deltas(1)[0][2] == [9]


def test_a_refusal_of_the_group_reaches_the_client(start: Start) -> None:
    near = start()
    group = near.group()
    client = near.client()
    client.send(type="generate", id=1, prompt_ids=[5])
    group.send(Refused(group.expect(Submit).request, "internal", "the logits are not finite"))
    error = client.expect_error("internal", 1)
    assert error["message"] == "the logits are not finite" and not error["retry"]
    assert group.silent()
