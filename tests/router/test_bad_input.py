"""Bad input gets a clear error at once and harms nobody."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from albireo.ipc.messages import Submit

from .conftest import Neighbourhood
from .fakes import CONTEXT, VOCAB, RawClient, piece

Start = Callable[..., Neighbourhood]
GOOD = {"type": "generate", "id": 7, "prompt_ids": [5, 6]}


def params(**values: Any) -> dict[str, Any]:
    return {**GOOD, "params": values}


BAD_REQUESTS = {
    "unknown field": ({**GOOD, "colour": 1}, "invalid_request", "colour"),
    "unknown sampling parameter": (params(beam_width=4), "invalid_request", "beam_width"),
    "text for a number": (params(max_tokens="many"), "invalid_request", "max_tokens"),
    "fraction for a number": (params(top_k=1.5), "invalid_request", "top_k"),
    "a map for a list": ({**GOOD, "prompt_ids": {}}, "invalid_request", "prompt_ids"),
    "text among ids": ({**GOOD, "prompt_ids": [1, "a"]}, "invalid_request", "prompt_ids"),
    "no prompt": ({"type": "generate", "id": 7}, "invalid_request", "prompt"),
    "two prompts": ({**GOOD, "prompt": "a"}, "invalid_request", "prompt"),
    "empty text": ({"type": "generate", "id": 7, "prompt": ""}, "invalid_request", "prompt"),
    "no ids": ({**GOOD, "prompt_ids": []}, "invalid_request", "prompt_ids"),
    "id below the vocabulary": ({**GOOD, "prompt_ids": [-1]}, "invalid_request", "prompt_ids"),
    "id above the vocabulary": ({**GOOD, "prompt_ids": [VOCAB]}, "invalid_request", "prompt_ids"),
    "prompt fills the context": ({**GOOD, "prompt_ids": [1] * CONTEXT}, "too_long", "prompt"),
    "prompt and answer too long": (params(max_tokens=CONTEXT - 1), "too_long", "max_tokens"),
    "max_tokens 0": (params(max_tokens=0), "invalid_request", "max_tokens"),
    "max_tokens negative": (params(max_tokens=-3), "invalid_request", "max_tokens"),
    "max_tokens of 64 bits": (params(max_tokens=2**63), "too_long", "max_tokens"),
    "min above max": (params(max_tokens=2, min_tokens=3), "invalid_request", "min_tokens"),
    "min above the default": (params(min_tokens=17), "invalid_request", "min_tokens"),
    "temperature NaN": (params(temperature=math.nan), "invalid_request", "temperature"),
    "temperature infinite": (params(temperature=math.inf), "invalid_request", "temperature"),
    "temperature negative": (params(temperature=-0.1), "invalid_request", "temperature"),
    "repetition of nothing": (
        params(repetition_penalty=1e-7),
        "invalid_request",
        "repetition_penalty",
    ),
    "top_p 0": (params(top_p=0.0), "invalid_request", "top_p"),
    "stop id out of range": (params(stop_token_ids=[VOCAB]), "invalid_request", "stop_token_ids"),
    "empty stop string": (params(stop=[""]), "invalid_request", "stop"),
    "empty chat": ({"type": "chat", "id": 7, "messages": []}, "invalid_request", "messages"),
    "chat without content": (
        {"type": "chat", "id": 7, "messages": [{"role": "user"}]},
        "invalid_request",
        "messages",
    ),
    "nothing to tokenize": ({"type": "tokenize", "id": 7}, "invalid_request", "text"),
    "ids to detokenize out of range": (
        {"type": "detokenize", "id": 7, "token_ids": [VOCAB]},
        "invalid_request",
        "token_ids",
    ),
    "unknown type": ({"type": "destroy", "id": 7}, "invalid_request", "type"),
    "no type": ({"id": 7}, "invalid_request", None),
    "type of the router's": ({"type": "welcome", "id": 7}, "invalid_request", "type"),
}


@pytest.mark.parametrize("name", BAD_REQUESTS)
def test_a_bad_request_is_refused_by_its_id_and_the_connection_goes_on(
    start: Start, name: str
) -> None:
    message, code, param = BAD_REQUESTS[name]
    near = start()
    group = near.group()
    client = near.client()
    client.send(**message)
    error = client.expect_error(code, 7)
    assert error["param"] == param
    assert not error["retry"]
    assert_serves(client, group)


def test_the_errors_say_the_numbers(start: Start) -> None:
    client = start().client()
    client.send(**{**GOOD, "prompt_ids": [1] * 200})
    text = client.expect_error("too_long", 7)["message"]
    assert "200" in text and str(CONTEXT) in text and "73" in text
    client.send(**params(max_tokens=500))
    text = client.expect_error("too_long", 7)["message"]
    assert "2 prompt tokens + max_tokens 500 = 502" in text and "at most 126" in text
    client.send(**{**GOOD, "prompt_ids": [3, 4, 1000]})
    text = client.expect_error("invalid_request", 7)["message"]
    assert "prompt_ids[2] is 1000" in text and "0 to 999" in text


@pytest.mark.parametrize(
    ("name", "value"), [("logit_bias", {5: 1.0, 1000: 1.0}), ("allowed_token_ids", [5, 1000])]
)
def test_a_token_outside_the_vocabulary_is_refused(start: Start, name: str, value: Any) -> None:
    client = start().client()
    client.send(type="generate", id=1, prompt_ids=[5], params={name: value})
    error = client.expect_error("invalid_request", 1)
    assert error["param"] == name
    assert f"{name}[1] is 1000" in error["message"] and "0 to 999" in error["message"]


@pytest.mark.parametrize(
    ("name", "value"), [("priority", 1001), ("tenant", "t" * 257), ("cache_salt", "s" * 257)]
)
def test_who_asks_has_limits(start: Start, name: str, value: Any) -> None:
    client = start().client()
    client.send(type="generate", id=1, prompt_ids=[5], **{name: value})
    assert client.expect_error("invalid_request", 1)["param"] == name


def test_what_no_group_could_ever_hold_is_refused(start: Start) -> None:
    client = start(num_blocks=4).client()
    client.send(**params(max_tokens=70))
    text = client.expect_error("too_long", 7)["message"]
    assert "need 5 KV blocks of 16 tokens; a group has 4" in text and "at most 62" in text
    client.send(**{**GOOD, "prompt_ids": [1] * 64})
    assert "5 KV blocks" in client.expect_error("too_long", 7)["message"]


UNDECODABLE = {
    "invalid UTF-8": (
        msgspec.msgpack.encode({"type": "generate", "id": 7, "prompt": "????"}).replace(
            b"????", b"\xff\xfe\x80?"
        ),
        7,
    ),
    "half a message": (msgspec.msgpack.encode(GOOD)[:-1], None),
    "bytes behind the message": (msgspec.msgpack.encode(GOOD) + b"\x00", None),
    "nothing": (b"", None),
    "not msgpack": (b"\xc1\xc1", None),
    "a list": (msgspec.msgpack.encode([1, 2, 3]), None),
    "a number": (b"\x05", None),
    "an id that is text": (msgspec.msgpack.encode({**GOOD, "id": "seven"}), None),
    "an array of 4 billion": (
        b"\x83\xa4type\xa8generate\xa2id\x07\xaaprompt_ids\xdd\xff\xff\xff\xff",
        None,
    ),
    "nested a million deep": (
        b"\x83\xa4type\xa8generate\xa2id\x07\xaaprompt_ids" + b"\x91" * 1_000_000,
        None,
    ),
}


@pytest.mark.parametrize("name", UNDECODABLE)
def test_a_frame_that_cannot_be_decoded_is_answered_and_the_connection_goes_on(
    start: Start, name: str
) -> None:
    payload, request_id = UNDECODABLE[name]
    near = start()
    group = near.group()
    client = near.client()
    client.send_payload(payload)
    client.expect_error("invalid_request", request_id)
    assert_serves(client, group)


def test_a_message_of_100_mb_is_refused_by_its_prefix(start: Start) -> None:
    near = start()
    group = near.group()
    other = near.client()
    client = near.client()
    client.socket.sendall(struct.pack("<I", 100_000_000) + b"\x00" * 1000)
    assert "100000000" in client.expect_error("too_large", None)["message"]
    client.expect_close()
    assert_serves(other, group)


@pytest.mark.parametrize("protocol", [0, 2, 99])
def test_another_protocol_version_is_told_both_versions(start: Start, protocol: int) -> None:
    client = start().client(hello=False)
    client.send(type="hello", protocol=protocol, client="x", later_field=[1])
    text = client.expect_error("protocol", None)["message"]
    assert f"version {protocol}" in text and "version 1" in text
    client.expect_close()


@pytest.mark.parametrize(
    "first", [GOOD, {"type": "hello"}, {"type": "hello", "protocol": "1"}, {"protocol": 1}]
)
def test_the_first_message_must_be_hello(start: Start, first: dict[str, Any]) -> None:
    client = start().client(hello=False)
    client.send(**first)
    client.expect_error("protocol", None)
    client.expect_close()


def test_an_http_client_is_refused(start: Start) -> None:
    client = start().client(hello=False)
    client.socket.sendall(b"GET / HTTP/1.1\r\n\r\n")
    client.expect_error("too_large", None)
    client.expect_close()


def test_hello_comes_once(start: Start) -> None:
    near = start()
    group = near.group()
    client = near.client()
    client.send(type="hello", protocol=1)
    client.expect_error("invalid_request", None)
    assert_serves(client, group)


def test_an_id_in_use_is_refused_without_harm_to_its_owner(start: Start) -> None:
    near = start()
    group = near.group()
    client = near.client()
    client.send(**GOOD)
    request = group.expect(Submit).request
    for bad in (GOOD, {**GOOD, "colour": 1}, {"type": "cancel", "id": 7, "why": "x"}):
        client.send(**bad)
        client.expect_error("invalid_request", None)
    group.output(piece(request, 0, [9], "a", "stop"))
    assert client.receive_deltas(7)[-1][2] == [9]


def test_garbage_of_one_client_leaves_the_stream_of_another_alone(start: Start) -> None:
    near = start()
    group = near.group()
    victim = near.client()
    victim.send(**GOOD)
    request = group.expect(Submit).request
    for payload, _ in UNDECODABLE.values():
        near.client().send_payload(payload)
    near.client(hello=False).socket.sendall(b"\xff" * 64)
    group.output(piece(request, 0, [9], "a", "stop"))
    assert victim.receive_deltas(7)[-1][2] == [9]


def assert_serves(client: RawClient, group: Any) -> None:
    """The connection, and the router, still do their work."""
    client.send(type="generate", id=8, prompt_ids=[1])
    submit = group.expect(Submit)
    assert submit.prompt_ids == [1]
    group.output(piece(submit.request, 0, [4], "x", "stop"))
    assert [delta[2] for delta in client.receive_deltas(8)] == [[4]]
