"""What callers and handlers do while a connection is being made again, or is given up."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import queue
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from albireo.client import AlbireoError, AsyncClient, Client, ConnectionLost, NodeNotRunning
from albireo.client.async_link import _Wire
from albireo.client.replies import Replies
from albireo.client.requests import frame, generate_message, resolve_params, tokenize_message
from albireo.ipc.framing import FrameSplitter
from albireo.ipc.protocol import ClientMessage, Generate, Hello, Tokenize, Tokens, Welcome

from ..router.fakes import encode
from .conftest import Node, eventually

HALF = [998, 5]
"""A prompt that gets one token and no more."""
STUCK = [999]
WELCOME = Welcome(
    protocol=1, version="1.2.3", node="n", model="m", max_model_len=128, vocab_size=1000,
    max_frame_bytes=8 << 20,
)  # fmt: skip


class StrictNode:
    """Takes no request before its answer to the one before has been taken.

    holds: requests that it takes without an answer, after which the first connection breaks.
    """

    def __init__(self, path: str, holds: int) -> None:
        self._holds = holds
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(ConnectionError):
                self._speak(connection, FrameSplitter())
            self._holds = 0

    def _speak(self, connection: socket.socket, splitter: FrameSplitter) -> None:
        held = 0
        while data := connection.recv(4096):
            for payload in splitter.feed(data):
                message = msgspec.msgpack.decode(payload, type=ClientMessage)
                if isinstance(message, Hello):
                    connection.sendall(frame(WELCOME))
                    continue
                assert isinstance(message, Tokenize) and message.text is not None
                if not self._holds:
                    answer = Tokens(id=message.id, token_ids=[1] * len(message.text))
                    connection.sendall(frame(answer))
                elif (held := held + 1) == self._holds:
                    return


@pytest.mark.parametrize("when", ["connected", "reconnecting"])
def test_the_reader_never_waits_for_a_node_that_waits_for_it(tmp_path: Path, when: str) -> None:
    """More than the socket holds, both ways."""
    texts, text = 4, "x" * (1 << 20)
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()

    def ask(text: str, handler: Callable[[Any], None]) -> None:
        client.request(lambda number: tokenize_message(number, text, True), handler)

    def ask_all(_reply: Any = None) -> None:
        for _ in range(texts):
            ask(text, answers.put)

    path = str(tmp_path / "s")
    strict = StrictNode(path, texts if when == "reconnecting" else 0)
    with contextlib.closing(strict), Client.connect(path) as client:
        if when == "connected":
            ask("x", ask_all)  # on the reader's thread
        else:
            ask_all()
        for _ in range(texts):
            assert len(answers.get(timeout=20).token_ids) == len(text)


class DeafNode:
    """Reads nothing on its first connection but the Hello; answers one text on the next."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen()
        self.asked: list[str] = []
        threading.Thread(target=self._serve, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _serve(self) -> None:
        deaf, _ = self._listener.accept()
        deaf.recv(4096)
        deaf.sendall(frame(WELCOME))
        connection, _ = self._listener.accept()
        splitter = FrameSplitter()
        while data := connection.recv(1 << 20):
            for payload in splitter.feed(data):
                message = msgspec.msgpack.decode(payload, type=ClientMessage)
                if isinstance(message, Hello):
                    connection.sendall(frame(WELCOME))
                elif isinstance(message, Tokenize):
                    self.asked.append(message.text or "")
                    connection.sendall(frame(Tokens(id=message.id, token_ids=[7])))


def test_an_interrupt_in_the_middle_of_a_frame_spoils_nothing_after_it(tmp_path: Path) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    path = str(tmp_path / "s")
    before = signal.signal(signal.SIGALRM, interrupt)
    with contextlib.closing(DeafNode(path)) as node, Client.connect(path) as client:
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.05)
            with pytest.raises(KeyboardInterrupt):
                client.tokenize("x" * (4 << 20))  # more than the socket holds
        finally:
            signal.signal(signal.SIGALRM, before)
        assert client.in_flight == 0
        answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        client.request(lambda number: tokenize_message(number, "y", True), answers.put)
        assert answers.get(timeout=10).token_ids == [7]
        assert node.asked[-1] == "y"


def test_frames_are_sent_where_no_thread_can_be_had(
    mortal: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = threading.Thread.start

    def refuse(thread: threading.Thread) -> None:
        if "writer" in thread.name:
            refused.append(thread)
            raise RuntimeError("can't start new thread")
        start(thread)

    refused: list[threading.Thread] = []
    monkeypatch.setattr(threading.Thread, "start", refuse)

    with Client.connect(mortal.path) as client:
        stream = client.stream(HALF, max_tokens=9)
        next(stream)
        mortal.restart()
        assert next(stream).token_ids == [5]
    assert refused


@pytest.mark.parametrize("leave", ["cancel", "close"])
def test_leaving_while_a_new_connection_is_told_what_goes_on(
    mortal: Node, monkeypatch: pytest.MonkeyPatch, leave: str
) -> None:
    again = Replies.again

    def left_meanwhile(replies: Replies) -> list[bytes]:
        frames = again(replies)
        if frames:
            getattr(stream, leave)()
        return frames

    with Client.connect(mortal.path) as client:
        stream = client.stream(HALF, max_tokens=9)
        next(stream)
        monkeypatch.setattr(Replies, "again", left_meanwhile)
        mortal.restart()
        eventually(lambda: client.status()["requests"]["cancelled"] == 1)
        reasons = [delta.end.finish_reason for delta in stream if delta.end is not None]
        assert reasons == (["cancelled"] if leave == "cancel" else [])


@pytest.mark.parametrize("kind", ["blocking", "asynchronous"])
def test_a_handler_that_asks_again_waits_for_the_node(mortal: Node, kind: str) -> None:
    """The closed loop of a load generator."""
    errors: list[AlbireoError] = []
    over = threading.Event()
    ask: Callable[[], int]

    def on_reply(reply: Any) -> None:
        if isinstance(reply, AlbireoError):
            errors.append(reply)
            if len(errors) < 100_000:
                ask()
        elif reply.end is not None:
            over.set()

    def make(number: int) -> Generate:
        return generate_message(number, "abc", resolve_params(None, {"max_tokens": 3}))

    def come_and_go() -> None:
        mortal.die()
        eventually(lambda: len(errors) > 1)
        mortal.start()
        assert over.wait(20)

    async def asynchronous() -> None:
        nonlocal ask
        async with await AsyncClient.connect(mortal.path, reconnect_s=0.1) as client:
            ask = lambda: client.request(make, on_reply)  # noqa: E731
            client.request(lambda number: generate_message(number, STUCK, params), on_reply)
            await client.models()
            await asyncio.to_thread(come_and_go)

    params = resolve_params(None, {})
    if kind == "blocking":
        with Client.connect(mortal.path, reconnect_s=0.1) as client:
            ask = lambda: client.request(make, on_reply)  # noqa: E731
            client.request(lambda number: generate_message(number, STUCK, params), on_reply)
            client.models()
            come_and_go()
    else:
        asyncio.run(asynchronous())
    assert all(isinstance(each, NodeNotRunning) for each in errors)


@pytest.mark.parametrize("kind", ["blocking", "asynchronous"])
def test_what_is_asked_when_a_stream_ends_shortens_no_wait(mortal: Node, kind: str) -> None:
    mortal.die()
    mortal.journal = False
    mortal.start()
    replies: queue.SimpleQueue[Any] = queue.SimpleQueue()
    client: Client | AsyncClient

    def ask(handler: Callable[[Any], None], prompt: str | list[int] = "abc") -> None:
        params = resolve_params(None, {"max_tokens": 3})
        client.request(lambda number: generate_message(number, prompt, params), handler)

    def begun(reply: Any) -> None:
        replies.put(reply)
        if isinstance(reply, AlbireoError):
            ask(replies.put)

    def come_and_go() -> None:
        assert replies.get(timeout=20).token_ids == [998]
        mortal.die()
        assert isinstance(replies.get(timeout=20), ConnectionLost)
        time.sleep(0.05)
        mortal.start()
        tokens = [token for _ in range(3) for token in replies.get(timeout=20).token_ids]
        assert tokens == encode("abc")

    async def asynchronous() -> None:
        nonlocal client
        async with await AsyncClient.connect(mortal.path) as client:
            ask(begun, HALF)
            await asyncio.to_thread(come_and_go)

    if kind == "blocking":
        with Client.connect(mortal.path) as client:
            ask(begun, HALF)
            come_and_go()
    else:
        asyncio.run(asynchronous())


def test_a_connection_that_is_lost_before_anybody_waits_for_it_is_no_fault() -> None:
    said: list[dict[str, Any]] = []

    async def lose() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: said.append(context))
        wire = _Wire(Replies())
        wire.connection_lost(None)
        greeted = wire.greeted
        del wire
        with pytest.raises(ConnectionLost):
            await greeted
        _Wire(Replies()).connection_lost(None)
        gc.collect()

    asyncio.run(lose())
    assert said == []
