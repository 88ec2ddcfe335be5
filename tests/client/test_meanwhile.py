"""What callers and handlers do while a connection is being made again, or is given up."""

from __future__ import annotations

import contextlib
import queue
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from albireo.client import Client
from albireo.client.replies import Replies
from albireo.client.requests import frame, tokenize_message
from albireo.ipc.framing import FrameSplitter
from albireo.ipc.protocol import ClientMessage, Hello, Tokenize, Tokens, Welcome

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
