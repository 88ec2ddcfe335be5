"""The way of tokens from a detokenizer to the router, and its sending end."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from albireo.ipc.framing import FrameSplitter
from albireo.ipc.messages import Joined, Output, Piece
from albireo.ipc.output_lane import OutputSender, decode_joined, decode_output

JOINED = Joined("detokenizer", 2, 5, 77)


class Router:
    """Its end, without a loop."""

    def __init__(self, path: str) -> None:
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(path)
        self._listener.listen()
        self._path = Path(path)

    def accept(self) -> None:
        self.connection, _ = self._listener.accept()
        self.connection.settimeout(5.0)
        self._splitter = FrameSplitter(2**30)
        self._payloads: list[bytes] = []
        assert decode_joined(self._payload()) == JOINED

    def next(self) -> Output:
        return decode_output(self._payload())

    def close(self) -> None:
        self.connection.close()
        self._listener.close()
        self._path.unlink()

    def _payload(self) -> bytes:
        while not self._payloads:
            data = self.connection.recv(1 << 16)
            assert data
            self._payloads += self._splitter.feed(data)
        return self._payloads.pop(0)


def output(index: int, text: str = "a") -> Output:
    return Output([Piece(9, index, [index], text, None)])


@pytest.fixture
def sender(tmp_path: Path) -> Iterator[OutputSender]:
    made = OutputSender(str(tmp_path / "out.sock"), JOINED)
    yield made
    made.close()


def is_readable(sender: OutputSender) -> bool:
    return bool(select.select([sender], [], [], 0)[0])


def test_it_says_who_it_is_and_then_sends(sender: OutputSender, tmp_path: Path) -> None:
    router = Router(str(tmp_path / "out.sock"))
    sender.send(output(0))
    sender.send(output(1))
    router.accept()
    assert [router.next(), router.next()] == [output(0), output(1)]
    router.close()


def test_what_the_socket_does_not_take_is_kept_in_its_order(
    sender: OutputSender, tmp_path: Path
) -> None:
    router = Router(str(tmp_path / "out.sock"))
    sent = [output(index, "x" * 300_000) for index in range(5)]
    for each in sent:
        sender.send(each)
    router.accept()
    assert not sender.flush()
    received = []
    while len(received) < len(sent):
        assert select.select([router.connection, sender], [], [], 5.0)[0]
        if is_readable(sender):
            sender.flush()
        while len(received) < len(sent) and select.select([router.connection], [], [], 0)[0]:
            received += _arrived(router)
    assert received == sent
    assert sender.flush()
    assert not is_readable(sender), "nothing is left to be written"
    router.close()


def _arrived(router: Router) -> list[Output]:
    """What one read completes."""
    return [decode_output(each) for each in router._splitter.feed(router.connection.recv(1 << 16))]


def test_without_a_router_outputs_are_dropped(sender: OutputSender, tmp_path: Path) -> None:
    sender.send(output(0))
    assert sender.flush()
    router = Router(str(tmp_path / "out.sock"))
    sender.send(output(1))
    router.accept()
    assert router.next() == output(1)
    router.close()


def test_the_next_router_gets_what_the_dead_one_could_not(
    sender: OutputSender, tmp_path: Path
) -> None:
    """Whole frames, and none of what was left for the one before."""
    path = str(tmp_path / "out.sock")
    first = Router(path)
    sender.send(output(0, "x" * 3_000_000))
    first.accept()
    assert not sender.flush()
    first.close()
    assert is_readable(sender)
    assert sender.flush(), "nobody will read it"
    second = Router(path)
    sender.send(output(1))
    second.accept()
    assert second.next() == output(1)
    second.close()
    # A router that dies while nothing is sent is found out by the next output.
    third = Router(path)
    sender.send(output(2))
    third.accept()
    assert third.next() == output(2)
    third.close()
