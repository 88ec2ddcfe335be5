"""Limits that protect a node from a client without manners; numbers that must not repeat."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest

from albireo.ipc import protocol
from albireo.ipc.config import TenantConfig
from albireo.ipc.messages import Abort, Credit, Decoded, DecodeIds, Encoded, EncodeText, Submit
from albireo.router import connections as connections_module
from albireo.router import session as session_module
from albireo.router import texts as texts_module
from albireo.router.requests import NUMBERS_PER_ROUTER, RequestNumbers, Stream, TokenRequest
from albireo.router.session import Session

from .conftest import Neighbourhood
from .fakes import CONTEXT, RawClient, piece

Start = Callable[..., Neighbourhood]


def test_requests_in_flight_on_a_connection_are_limited(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "MAX_IN_FLIGHT", 3)
    near = start()
    client = near.client()
    for number in range(3):
        client.send(type="tokenize", id=number, text="a")
    client.send(type="generate", id=3, prompt_ids=[5])
    error = client.expect_error("queue_full", 3)
    assert error["retry"] and "3 requests" in error["message"]
    near.client().send(type="generate", id=3, prompt_ids=[5])
    assert isinstance(near.group().next(), Submit)


def test_connections_are_limited(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections_module.Connections, "most", 2)
    near = start()
    first = near.client()
    near.client()
    third = near.client(hello=False)
    assert third.expect_error("unavailable", None)["retry"]
    third.expect_close()
    first.close()
    for _ in range(100):
        again = near.client(hello=False)
        again.send(type="hello", protocol=1)
        if again.receive()["type"] == "welcome":
            return
    raise AssertionError("the place of a client that left is not given away")


def test_a_client_that_never_says_hello_is_sent_away(
    start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session_module, "HELLO_TIMEOUT_S", 0.05)
    client = start().client(hello=False)
    assert "no hello" in client.expect_error("protocol", None)["message"]
    client.expect_close()


def test_an_answer_that_is_too_large_for_a_frame_becomes_an_error(start: Start) -> None:
    near = start()
    tokenizer = near.tokenizer()
    client = near.client()
    client.send(type="detokenize", id=1, token_ids=[5] * 100_000)
    key = tokenizer.expect(DecodeIds).key
    tokenizer.send(Decoded(key, "x" * (protocol.MAX_FRAME_BYTES + 1)))
    assert "split" in client.expect_error("invalid_request", 1)["message"]
    client.send(type="detokenize", id=2, token_ids=[5] * 300_000)
    assert "300000 token ids" in client.expect_error("invalid_request", 2)["message"]


@pytest.mark.parametrize(
    "asked",
    [
        {"type": "generate", "prompt_ids": [5], "params": {"n": 2, "max_tokens": 9 * CONTEXT}},
        {"type": "generate", "prompt": "a" * 2_000},
        {"type": "chat", "messages": [{"role": "user", "content": "a" * 2_000}]},
    ],
    ids=["too long", "too much text", "too much said"],
)
def test_of_a_request_that_is_refused_nothing_is_kept(
    start: Start, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    """Not even a cycle, which would keep its whole connection until it is collected."""
    monkeypatch.setattr(texts_module, "MAX_BYTES", 1_000)
    near = start()
    near.client().send(type="tokenize", id=1, text="a")  # nobody answers it
    gc.collect()
    before = alive()
    gc.disable()
    try:
        for number in range(3):
            client = near.client()
            client.send(id=number, **({"params": {"n": 2}} | asked))
            assert client.receive()["type"] == "error"
            client.close()
        deadline = time.monotonic() + 5
        while alive() != before and time.monotonic() < deadline:
            time.sleep(0.01)
        assert alive() == before
    finally:
        gc.enable()


def alive() -> Counter[str]:
    """What there is of each kind, garbage included that is not collected yet."""
    kinds = {Session, TokenRequest, Stream}
    # Not by isinstance: it asks what a proxy stands for, which may be gone.
    return Counter(type(each).__name__ for each in gc.get_objects() if type(each) in kinds)


def test_what_is_alive_can_be_counted_beside_proxies_of_what_is_gone() -> None:
    gc.collect()
    before = alive()
    one = Session.__new__(Session)
    left = weakref.proxy(Session.__new__(Session))  # its session is gone at once
    assert any(each is left for each in gc.get_objects())
    assert alive() - before == Counter(Session=1)
    del one
    assert alive() == before


def test_numbers_differ_from_those_of_the_router_before_and_skip_what_is_in_use() -> None:
    numbers = RequestNumbers(incarnation=5)
    used = {(5 << 24) + 2: None}
    assert [numbers.take(used) for _ in range(3)] == [(5 << 24) + each for each in (1, 3, 4)]  # type: ignore[arg-type]
    assert RequestNumbers(incarnation=128 + 5).take({}) == (5 << 24) + 1
    last = RequestNumbers(incarnation=127)
    last._next = NUMBERS_PER_ROUTER - 1
    assert last.take({}) == 2**31 - 1
    assert last.take({}) == (127 << 24) + 1


def test_a_tenant_has_a_limit_of_its_own(start: Start) -> None:
    near = start(tenants=TenantConfig(max_num_reqs=3))
    group = near.group()
    one, other = near.client(), near.client()

    def ask(client: RawClient, number: int, n: int = 1, tenant: str = "") -> None:
        client.send(type="generate", id=number, prompt_ids=[5], tenant=tenant, params={"n": n})

    ask(one, 1, 2)
    ask(one, 2)
    found = [group.expect(Submit).request for _ in range(3)]
    ask(one, 3)
    error = one.expect_error("queue_full", 3)
    assert error["retry"] and "3 answers of this client" in error["message"]
    ask(one, 3, 2)
    assert "asks for 2" in one.expect_error("queue_full", 3)["message"]
    ask(other, 1, 4)
    error = other.expect_error("invalid_request", 1)  # and never, however long it waits
    assert not error["retry"] and error["param"] == "n" and "4 answers" in error["message"]
    ask(other, 2, tenant="alice")
    ask(one, 4, tenant="alice")
    assert {group.expect(Submit).tenant for _ in range(2)} == {"alice"}
    # Room comes back with ends of every kind.
    group.output(piece(found[0], 0, [1], "", "stop"))
    assert one.receive()["items"]
    one.send(type="cancel", id=2)
    assert one.receive()["items"]
    ask(one, 5, 2)
    assert group.expect(Credit) and group.expect(Abort)
    assert group.expect(Submit) and group.expect(Submit)


def test_a_request_has_the_weight_of_its_tenant(start: Start) -> None:
    near = start(tenants=TenantConfig(weights={"alice": 4.0, "batch": 0.5}))
    group, client = near.group(), near.client()
    for number, tenant in enumerate(("alice", "", "batch", "bob")):
        client.send(type="generate", id=number, prompt_ids=[5], tenant=tenant)
    found = [group.expect(Submit) for _ in range(4)]
    assert [each.weight for each in found] == [4.0, 1.0, 0.5, 1.0]
    assert [each.cache_salt for each in found] == [""] * 4


def test_a_tenant_has_a_limit_of_tokens(start: Start) -> None:
    near = start(tenants=TenantConfig(max_num_tokens=100))
    group = near.group()
    tokenizer = near.tokenizer()
    one, other = near.client(), near.client()

    def ask(client: RawClient, number: int, max_tokens: int, **more: object) -> None:
        params = {"max_tokens": max_tokens, **more}
        client.send(type="generate", id=number, prompt_ids=[5] * 10, params=params)

    ask(one, 1, 40)
    first = group.expect(Submit).request
    ask(one, 2, 20, n=2)
    error = one.expect_error("queue_full", 2)
    assert error["retry"] and "60 tokens" in error["message"] and "50 of this" in error["message"]
    ask(one, 3, 91)
    error = one.expect_error("too_long", 3)
    assert not error["retry"] and error["param"] == "max_tokens"
    # A text is counted when its tokens are known.
    one.send(type="generate", id=4, prompt="text", params={"max_tokens": 40})
    tokenizer.send(Encoded(tokenizer.expect(EncodeText).key, [5] * 11))
    assert "51 tokens" in one.expect_error("queue_full", 4)["message"]
    ask(other, 1, 90)
    assert group.expect(Submit)
    # Room comes back with ends of every kind.
    ask(one, 5, 40)
    assert group.expect(Submit)
    group.output(piece(first, 0, [1], "", "stop"))
    assert one.receive()["items"]
    one.send(type="cancel", id=5)
    assert one.receive()["items"]
    assert group.expect(Credit) and group.expect(Abort)
    ask(one, 6, 15, n=4)
    assert all(group.expect(Submit) for _ in range(4))
    one.close()
    assert all(group.expect(Abort) for _ in range(4))
