"""What the library does with a peer that is of another version, silent, or no node at all."""

from __future__ import annotations

import asyncio
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from albireo.client import (
    AlbireoError,
    AsyncClient,
    Client,
    ConnectionLost,
    NodeNotRunning,
    ProtocolMismatch,
    async_link,
    blocking_link,
)
from albireo.ipc.protocol import Error


def frame(message: msgspec.Struct) -> bytes:
    payload = msgspec.msgpack.encode(message)
    return struct.pack("<I", len(payload)) + payload


@contextmanager
def peer(path: Path, answer: bytes | None) -> Iterator[str]:
    """Answers the first bytes of each connection with `answer` and closes; None: stays silent."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen()
    kept: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            connection.recv(1000)
            if answer is None:
                kept.append(connection)
            else:
                connection.sendall(answer)
                connection.close()

    threading.Thread(target=serve, daemon=True).start()
    yield str(path)
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    for connection in kept:
        connection.close()


def connect_blocking(path: str) -> None:
    Client.connect(path).close()


def connect_asynchronous(path: str) -> None:
    async def connect() -> None:
        await (await AsyncClient.connect(path)).close()

    asyncio.run(connect())


@pytest.fixture(params=[connect_blocking, connect_asynchronous])
def connect(request: pytest.FixtureRequest) -> Callable[[str], None]:
    found: Callable[[str], None] = request.param
    return found


MISMATCH = frame(
    Error(id=None, code="protocol", message="the client speaks version 1, this node version 2")
)


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (MISMATCH, ProtocolMismatch),
        (b"", ConnectionLost),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", ConnectionLost),
        (b"\x03\x00\x00\x00abc", ConnectionLost),
        (b"\x03\x00\x00\x00ab", ConnectionLost),
    ],
)
def test_a_wrong_peer_is_an_error_at_connect(
    connect: Callable[[str], None], tmp_path: Path, answer: bytes, error: type[AlbireoError]
) -> None:
    with peer(tmp_path / "s", answer) as path, pytest.raises(error):
        connect(path)


def test_a_silent_peer_is_not_waited_for_for_ever(
    connect: Callable[[str], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(async_link, "CONNECT_TIMEOUT_S", 0.05)
    monkeypatch.setattr(blocking_link, "CONNECT_TIMEOUT_S", 0.05)
    with (
        peer(tmp_path / "s", None) as path,
        pytest.raises(NodeNotRunning, match=r"did not answer within 0\.05 s"),
    ):
        connect(path)
