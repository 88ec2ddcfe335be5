"""Clients over several routers: what goes on, what is asked again, what ends, and when."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from albireo.client import (
    AlbireoError,
    AsyncClient,
    Client,
    ConnectionLost,
    Delta,
    End,
    InternalError,
    NodeNotRunning,
)
from albireo.client.reconnect import Backoff
from albireo.client.replies import MAX_LOSSES, Incoming, Replies
from albireo.client.requests import frame, generate_message, resolve_params
from albireo.ipc.protocol import ClientMessage, Deltas, Error, Generate, Resume

from ..router.fakes import encode
from .conftest import Node, eventually

HALF = [998, 5]
"""A prompt that gets one token and no more."""
STUCK = [999]


@pytest.fixture
def node(mortal: Node) -> Node:
    return mortal


def test_a_stream_goes_on(node: Node) -> None:
    with Client.connect(node.path) as client:
        stream = client.stream(HALF, max_tokens=9)
        first = next(stream)
        assert (first.index, first.token_ids) == (0, [998])
        node.restart()
        second = next(stream)
        assert (second.index, second.token_ids) == (1, [5])
        assert client.status()["requests"]["resumed"] == 1


@pytest.mark.parametrize("blocking", [True, False])
def test_a_client_that_is_closed_leaves_nothing_waiting(node: Node, blocking: bool) -> None:
    """A node that keeps requests for their client need not keep these."""

    async def leave() -> None:
        client = await AsyncClient.connect(node.path)
        await anext(aiter(client.stream(HALF, max_tokens=9)))
        await client.close()

    if blocking:
        client = Client.connect(node.path)
        next(stream := client.stream(HALF, max_tokens=9))
        client.close()
        with pytest.raises(ConnectionLost):
            next(stream)
    else:
        asyncio.run(leave())
    with Client.connect(node.path) as other:
        eventually(lambda: other.status()["requests"]["in_flight"] == 0)
        requests = other.status()["requests"]
    assert (requests["waiting_for_client"], requests["cancelled"]) == (0, 1)


@pytest.mark.parametrize("journal", [True, False])
def test_whole_answers_do_not_notice(node: Node, journal: bool) -> None:
    node.die()
    node.journal = journal
    node.start()

    async def run() -> None:
        async with await AsyncClient.connect(node.path) as client:
            waiting = [
                asyncio.create_task(client.generate("abc" * (1 + n), max_tokens=90, n=3))
                for n in range(5)
            ]
            half = asyncio.create_task(client.generate(HALF, max_tokens=2))
            await client.models()
            await asyncio.to_thread(node.restart)
            for answer in [await each for each in waiting]:
                assert [each.token_ids for each in answer.choices] == [encode("abc") * 30] * 3
                assert answer.usage.completion_tokens == 270
            half.cancel()
            assert (await client.tokenize("xy")) == encode("xy")

    asyncio.run(run())


def test_without_a_journal_a_stream_ends_at_once_and_says_why(node: Node) -> None:
    node.die()
    node.journal = False
    node.start()
    with Client.connect(node.path) as client:
        begun = client.stream(HALF, max_tokens=9)
        next(begun)
        node.automatic.stop()  # so that nothing comes of the other one
        untouched = client.stream("abc", max_tokens=3)
        node.die()
        with pytest.raises(ConnectionLost, match=r"--journal.*ask again") as error:
            next(begun)
        assert error.value.retry
        node.start()
        assert [t for delta in untouched for t in delta.token_ids] == encode("abc")


def test_when_the_time_is_over_each_waiter_has_an_error_of_its_own(node: Node) -> None:
    with Client.connect(node.path, reconnect_s=0.1) as client:
        streams = [client.stream(STUCK) for _ in range(3)]
        assert client.models()
        node.die()
        errors = []
        for stream in streams:
            with pytest.raises(NodeNotRunning, match="albireo node start") as error:
                next(stream)
            assert error.value.retry
            errors.append(error.value)
        assert len({id(each) for each in errors}) == 3


def test_what_is_asked_while_the_router_is_away_waits_for_it(node: Node) -> None:
    async def run() -> None:
        async with await AsyncClient.connect(node.path) as client:
            await asyncio.to_thread(node.die)
            answers = [
                asyncio.create_task(client.generate("abc", max_tokens=3)),
                asyncio.create_task(client.tokenize("abc")),
                asyncio.create_task(client.status()),
            ]
            abandoned = client.stream(STUCK)
            await abandoned.aclose()
            cancelled = client.stream(STUCK)
            cancelled.cancel()
            await asyncio.sleep(0.05)
            await asyncio.to_thread(node.start)
            assert (await answers[0]).text == "abc"
            assert await answers[1] == encode("abc")
            assert (await answers[2])["node"] == "test"
            [delta] = [delta async for delta in cancelled]
            assert delta.end is not None and delta.end.finish_reason == "cancelled"
            assert (await client.status())["requests"]["in_flight"] == 0

    asyncio.run(run())


@pytest.mark.parametrize("kind", ["blocking", "asynchronous"])
def test_a_node_that_stays_away_and_comes_back_much_later(node: Node, kind: str) -> None:
    def blocking() -> None:
        with Client.connect(node.path, reconnect_s=0.1) as client:
            stream = client.stream(HALF)
            next(stream)
            node.die()
            for _ in range(2):
                with pytest.raises(NodeNotRunning):
                    list(stream)
                stream = client.stream("abc")
            with pytest.raises(NodeNotRunning):
                list(stream)
            node.start()
            assert client.generate("abc", max_tokens=1, timeout_s=10).text == "a"

    async def asynchronous() -> None:
        async with await AsyncClient.connect(node.path, reconnect_s=0.1) as client:
            stream = client.stream(HALF)
            await anext(stream)
            await asyncio.to_thread(node.die)
            with pytest.raises(NodeNotRunning):
                await anext(stream)
            for _ in range(2):
                with pytest.raises(NodeNotRunning):
                    await client.generate("abc")
            await asyncio.to_thread(node.start)
            assert (await client.generate("abc", max_tokens=1)).text == "a"

    if kind == "blocking":
        blocking()
    else:
        asyncio.run(asynchronous())


def test_closing_while_the_router_is_away(node: Node) -> None:
    client = Client.connect(node.path)
    stream = client.stream(HALF)
    next(stream)
    node.die()
    client.close()
    with pytest.raises(ConnectionLost, match="closed by this client"):
        next(stream)

    async def run() -> None:
        client = await AsyncClient.connect(node.path)
        stream = client.stream(HALF)
        await anext(stream)
        await asyncio.to_thread(node.die)
        await client.close()
        with pytest.raises(ConnectionLost, match="closed by this client"):
            await anext(stream)

    node.start()
    asyncio.run(run())


def test_a_request_that_kills_routers_is_not_asked_for_ever(node: Node) -> None:
    with Client.connect(node.path) as client:
        stream = client.stream(STUCK)
        for _ in range(MAX_LOSSES):
            assert client.models()
            node.restart()
        with pytest.raises(ConnectionLost, match=f"{MAX_LOSSES} connections"):
            next(stream)


def test_a_slow_reader_has_every_token_once(node: Node) -> None:
    """More waits for it than the connection's buffers hold when the router dies."""
    requests, answers, tokens = 5, 64, 80
    found: dict[tuple[int, int], list[int]] = {}
    errors: list[AlbireoError] = []
    ends = threading.Semaphore(0)
    go_on = threading.Event()

    def take(number: int, reply: Any) -> None:
        if isinstance(reply, AlbireoError):
            errors.append(reply)
            ends.release(answers)
            return
        got = found.setdefault((number, reply.choice), [])
        assert reply.index == len(got)
        got += reply.token_ids
        go_on.wait(20)
        if reply.end is not None:
            ends.release()

    params = resolve_params(None, {"n": answers, "max_tokens": tokens})
    with Client.connect(node.path) as client, Client.connect(node.path) as other:
        eventually(lambda: all(g["state"] == "ready" for g in other.status()["groups"]))
        for number in range(requests):
            client.request(
                lambda given: generate_message(given, [7, 8, 9], params),
                lambda reply, number=number: take(number, reply),
            )
        eventually(lambda: other.status()["requests"]["finished"] == requests * answers)
        node.restart()
        go_on.set()
        for _ in range(requests * answers):
            assert ends.acquire(timeout=20)
        assert errors == []
        assert set(map(tuple, found.values())) == {tuple(([7, 8, 9] * tokens)[:tokens])}
        assert len(found) == requests * answers
        assert other.status()["requests"]["resumed"] > 0, "nothing was lost with the router"


def test_a_gap_or_a_repeat_is_an_error() -> None:
    for index in (0, 2):
        replies, sent, got = Replies(), [], []
        begin, pending = replies.prepare(
            lambda number: generate_message(number, [1], resolve_params(None, {})),
            got.append, 1 << 20,
        )  # fmt: skip
        replies.begin(begin, pending)
        incoming = Incoming(replies, sent.append)
        for place in (0, index):
            incoming.feed(frame(Deltas(items=[Delta(begin, place, [1], "x")])))
        assert isinstance(got[-1], InternalError) and "gap or a repeat" in str(got[-1])
        assert len(got) == 2 and len(sent) == 1 and not replies.expects(begin)
        incoming.feed(frame(Deltas(items=[Delta(begin, 1, [], "", End("stop", None, 1, 1))])))
        assert len(got) == 2


def test_waits_grow_up_to_a_deadline() -> None:
    backoff = Backoff(60.0)
    waits = [backoff.next() for _ in range(30)]
    assert all(wait is not None and 0 < wait <= 0.5 for wait in waits)
    assert waits[0] is not None and waits[0] <= 0.01
    assert Backoff(0.0).next() is None


class Collected:
    """A handler that keeps all answers apart; with `restart` one that can begin again."""

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.ends: list[int] = []
        self.errors: list[AlbireoError] = []

    def take(self, reply: Any) -> None:
        if isinstance(reply, AlbireoError):
            self.errors.append(reply)
            return
        tokens = self.tokens.setdefault(reply.choice, [])
        assert reply.index == len(tokens) and reply.choice not in self.ends
        tokens += reply.token_ids
        if reply.end is not None:
            self.ends.append(reply.choice)


class Whole(Collected):
    def __call__(self, reply: Any) -> None:
        self.take(reply)

    def restart(self) -> None:
        self.tokens.clear()
        self.ends.clear()


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4), st.booleans()), max_size=40),
    st.booleans(),
    st.booleans(),
    st.integers(0, 3),
)
def test_wherever_connections_break_each_answer_comes_once(
    lengths: list[int], plan: list[tuple[int, int, bool]], keeps: bool, whole: bool, forgets: int
) -> None:
    """plan: which answer the node goes on with, by how many tokens, and whether it breaks then.

    keeps: the node keeps requests; every `forgets`-th time that it is asked to resume it does not.
    """
    answers = [[choice * 100 + place for place in range(n)] for choice, n in enumerate(lengths)]
    params = resolve_params(None, {"n": len(answers)})
    handler = Whole() if whole else Collected()
    put = handler if whole else handler.take
    replies, sent, resumes = Replies(), [], 0
    number, pending = replies.prepare(lambda n: generate_message(n, [1], params), put, 1 << 20)
    replies.begin(number, pending)
    incoming = Incoming(replies, sent.append)
    at = dict.fromkeys(range(len(answers)), 0)

    def asked(encoded: bytes) -> None:
        """What the node does about a frame."""
        nonlocal resumes
        message = msgspec.msgpack.decode(encoded[4:], type=ClientMessage)
        at.clear()
        if isinstance(message, Generate):
            at.update(dict.fromkeys(range(len(answers)), 0))
            return
        assert isinstance(message, Resume)
        resumes += 1
        if forgets and resumes % forgets == 0:
            incoming.feed(frame(Error(id=number, code="lost", message="gone", retry=True)))
            while sent:
                asked(sent.pop())
        else:
            at.update({have.choice: have.tokens for have in message.have})

    for choice, count, breaks in [*plan, *((each, 99, False) for each in range(len(answers)))]:
        if choice in at and replies.expects(number):
            ids = answers[choice][at[choice] : at[choice] + count]
            over = at[choice] + count >= len(answers[choice])
            end = End("stop", None, 1, len(answers[choice])) if over else None
            incoming.feed(frame(Deltas(items=[Delta(number, at[choice], ids, "", end, choice)])))
            at[choice] += len(ids)
            if over:
                del at[choice]
        if breaks:
            replies.break_off(keeps)
            incoming = Incoming(replies, sent.append)
            for encoded in replies.again():
                asked(encoded)
    assert not replies.expects(number)
    if handler.errors:
        assert len(handler.errors) == 1 and isinstance(handler.errors[0], ConnectionLost)
        assert all(ids == answers[c][: len(ids)] for c, ids in handler.tokens.items())
    else:
        assert sorted(handler.ends) == list(range(len(answers)))
        assert [handler.tokens[c] for c in range(len(answers))] == answers
