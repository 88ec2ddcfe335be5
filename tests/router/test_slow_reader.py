"""A client that does not read costs a bounded amount of memory, and nobody else anything."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest

from albireo.ipc.messages import Abort, Credit, GroupDown, Submit
from albireo.ipc.protocol import Logprobs, TokenLogprob
from albireo.router import session as session_module

from .conftest import Neighbourhood
from .fakes import FakeGroup, RawClient, piece

Start = Callable[..., Neighbourhood]
STREAMS = 16
LONG = 60_000
SCORED = [
    Logprobs(TokenLogprob(99_999, -1.25, 7, b" token"), [TokenLogprob(5, -0.5, 1, b" five")] * 20)
]


def begin(near: Neighbourhood, group: FakeGroup, client: RawClient) -> list[int]:
    """Starts the streams, with ids from 1."""
    for number in range(1, STREAMS + 1):
        client.send(type="generate", id=number, prompt_ids=[5], params={"max_tokens": LONG - 10})
    return [group.expect(Submit).request for _ in range(STREAMS)]


def feed(group: FakeGroup, requests: list[int], start: int, batches: int, text: str) -> None:
    """That many batches, with one credit after the other."""
    for index in range(start, start + batches):
        group.output(*(piece(request, index, [index % 500], text) for request in requests))
        assert isinstance(group.next(), Credit)


def test_waiting_deltas_are_merged_and_nothing_is_lost(start: Start) -> None:
    near = start(max_model_len=LONG, num_blocks=LONG)
    group = near.group()
    slow, quick = near.client(), near.client()
    requests = begin(near, group, slow)
    quick.send(type="generate", id=1, prompt_ids=[5])
    other = group.expect(Submit).request
    batches = 3000
    feed(group, requests, 0, batches, "some text ")
    # Meanwhile somebody else is served.
    group.output(piece(other, 0, [1], "a", "stop"))
    assert quick.receive_deltas(1)[0][3] == "a"
    assert isinstance(group.next(), Credit)
    group.output(*(piece(request, batches, [499], "!", "stop") for request in requests))
    deltas: dict[int, list[list[object]]] = {number: [] for number in range(1, STREAMS + 1)}
    frames = 0
    while any(not found or found[-1][4] is None for found in deltas.values()):
        frames += 1
        for item in slow.receive()["items"]:
            deltas[item[0]].append(item)
    for found in deltas.values():
        ids = [token for item in found for token in item[2]]  # type: ignore[attr-defined]
        assert ids == [index % 500 for index in range(batches)] + [499]
        assert "".join(str(item[3]) for item in found) == "some text " * batches + "!"
        expected = 0
        for item in found:
            assert (item[1], item[8]) == (expected, 0 if expected else 1)
            expected += len(item[2])  # type: ignore[arg-type]
    assert frames < batches, "nothing was merged"


def test_an_error_comes_behind_the_tokens_that_wait(start: Start) -> None:
    near = start(max_model_len=LONG, num_blocks=LONG)
    group = near.group()
    supervisor = near.supervisor()
    client = near.client()
    requests = begin(near, group, client)
    feed(group, requests, 0, 1500, "some more text ")
    client.send(type="cancel", id=1)
    assert isinstance(group.next(), Abort)
    supervisor.send(GroupDown(0, 0, "it died"))
    tokens = dict.fromkeys(range(1, STREAMS + 1), 0)
    ended = {}
    while len(ended) < STREAMS:
        message = client.receive()
        for item in message.get("items", ()):
            assert item[0] not in ended and item[1] == tokens[item[0]]
            tokens[item[0]] += len(item[2])
            if item[4] is not None:
                ended[item[0]] = item[4][0]
        if message["type"] == "error":
            ended[message["id"]] = message["code"]
    assert set(tokens.values()) == {1500}
    assert ended == {1: "cancelled"} | dict.fromkeys(range(2, STREAMS + 1), "group_failed")


def test_an_id_whose_end_waits_is_still_in_use(start: Start) -> None:
    near = start(max_model_len=LONG, num_blocks=LONG)
    group = near.group()
    client = near.client()
    requests = begin(near, group, client)
    feed(group, requests, 0, 1500, "some more text ")
    group.output(*(piece(request, 1500, [1], "", "stop") for request in requests))
    assert isinstance(group.next(), Credit)
    client.send(type="generate", id=3, prompt_ids=[5])
    assert group.silent()
    seen = []
    while len(seen) < STREAMS + 1:
        message = client.receive()
        if message["type"] == "error":
            assert message["id"] is None and "id 3 is in use" in message["message"]
            seen.append("error")
        else:
            seen += [item[0] for item in message["items"] if item[4] is not None]
    client.send(type="generate", id=3, prompt_ids=[5])
    assert isinstance(group.next(), Submit)


def test_a_stream_whose_tokens_wait_is_one_request(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_IN_FLIGHT", STREAMS + 2)
    near = start(max_model_len=LONG, num_blocks=LONG)
    group = near.group()
    client = near.client()
    requests = begin(near, group, client)
    feed(group, requests, 0, 1500, "some more text ")
    for number in range(STREAMS + 1, STREAMS + 3):
        client.send(type="generate", id=number, prompt_ids=[5])
        assert isinstance(group.next(), Submit)
    client.send(type="generate", id=STREAMS + 3, prompt_ids=[5])
    assert group.silent()
    while (message := client.receive())["type"] != "error":
        pass
    assert message["code"] == "queue_full" and f"{STREAMS + 2} requests" in message["message"]


def test_a_client_that_asks_and_never_reads_is_not_read_any_more(start: Start) -> None:
    near = start()
    client = near.client()
    client.socket.settimeout(0.5)
    sent = 0
    try:
        while sent < 200_000:
            client.send(type="status", id=1)
            sent += 1
    except TimeoutError:
        pass
    assert sent < 200_000, "the router goes on reading and holds the answers"
    other = near.client()
    other.send(type="models", id=1)
    assert other.receive()["type"] == "model_list"


def test_answers_to_one_request_are_merged_apart(start: Start) -> None:
    near = start(max_model_len=LONG, num_blocks=LONG)
    group, slow = near.group(), near.client()
    begin(near, group, slow)
    slow.send(type="generate", id=99, prompt_ids=[5], params={"n": 2, "max_tokens": 4000})
    zero, one = (group.expect(Submit).request for _ in range(2))
    batches = 3000
    for index in range(batches):
        group.output(piece(zero, index, [1], "zero " * 20), piece(one, index, [2], "one " * 20))
        assert isinstance(group.next(), Credit)
    group.output(piece(zero, batches, [1], "", "stop"), piece(one, batches, [2], "", "stop"))
    texts, counts, open_answers = ["", ""], [0, 0], 2
    while open_answers:
        for item in slow.receive()["items"]:
            choice = item[5]
            assert item[0] == 99 and item[1] == counts[choice]
            assert set(item[2]) == {choice + 1}
            counts[choice] += len(item[2])
            texts[choice] += item[3]
            open_answers -= item[4] is not None
    assert counts == [batches + 1, batches + 1]
    assert texts == ["zero " * 20 * batches, "one " * 20 * batches]


@pytest.mark.parametrize("positions", [2048, 28 * 1024], ids=["merged", "in one step"])
def test_no_frame_is_above_the_limit_however_much_was_scored(start: Start, positions: int) -> None:
    """20 best tokens for each place of a long prompt: one Delta of all would be above it."""
    near = start(max_model_len=LONG, num_blocks=LONG)
    group, slow = near.group(), near.client()
    prompt = 28 * 1024
    slow.send(
        type="generate",
        id=1,
        prompt_ids=[5] * prompt,
        params={"prompt_logprobs": 20, "logprobs": 0},
    )
    request = group.expect(Submit).request
    chunk = msgspec.structs.replace(piece(request, 0, []), prompt_logprobs=SCORED * positions)
    for _ in range(prompt // positions):
        group.output(chunk)
        assert isinstance(group.next(), Credit)
    last = piece(request, 0, [7], "a", "stop", prompt)
    group.output(msgspec.structs.replace(last, logprobs=SCORED[:1], prompt_logprobs=SCORED))
    assert isinstance(group.next(), Credit)
    found = slow.receive_deltas(1)
    assert sum(len(item[7] or ()) for item in found) == prompt + 1
    assert [item[2:5] for item in found[:-1]] == [[[], "", None]] * (len(found) - 1)
    assert found[-1][1:4] == [0, [7], "a"] and len(found[-1][6]) == 1


def test_what_waits_goes_in_parts_whose_text_is_that_of_their_tokens(start: Start) -> None:
    """So that a client that has some of them only, when its connection breaks, lacks no text."""
    near = start(max_model_len=LONG, num_blocks=LONG)
    group, slow = near.group(), near.client()
    slow.send(type="generate", id=1, prompt_ids=[5], params={"max_tokens": 40, "logprobs": 0})
    request = group.expect(Submit).request
    text = "x" * 300_000
    for index in range(30):
        group.output(piece(request, index, [index], text, "stop" if index == 29 else None))
        assert isinstance(group.next(), Credit)
    found = slow.receive_deltas(1)
    assert 10 <= len(found) < 30, "nothing was merged, or too much"
    assert [token for item in found for token in item[2]] == list(range(30))
    for item in found:
        assert item[1] == item[2][0] and item[3] == text * len(item[2])
