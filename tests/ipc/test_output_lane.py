"""The way of tokens from a detokenizer to the router, and its sending end."""

from __future__ import annotations

import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from albireo.ipc.messages import Joined, Output, Piece
from albireo.ipc.output_lane import OutputSender

from ..output_receiver import OutputReceiver

JOINED = Joined("detokenizer", 2, 5, 77)


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
    router = OutputReceiver(str(tmp_path / "out.sock"))
    sender.send(output(0))
    sender.send(output(1))
    router.accept()
    assert router.joined == JOINED
    assert [router.next(), router.next()] == [output(0), output(1)]
    router.close()


def test_what_the_socket_does_not_take_is_kept_in_its_order(
    sender: OutputSender, tmp_path: Path
) -> None:
    router = OutputReceiver(str(tmp_path / "out.sock"))
    sent = [output(index, "x" * 300_000) for index in range(5)]
    for each in sent:
        sender.send(each)
    router.accept()
    assert router.joined == JOINED
    assert not sender.flush()
    received = []
    while len(received) < len(sent):
        assert select.select([router.connection, sender], [], [], 5.0)[0]
        if is_readable(sender):
            sender.flush()
        while len(received) < len(sent) and select.select([router.connection], [], [], 0)[0]:
            received += router.arrived()
    assert received == sent
    assert sender.flush()
    assert not is_readable(sender), "nothing is left to be written"
    router.close()


def test_without_a_router_outputs_are_dropped(sender: OutputSender, tmp_path: Path) -> None:
    sender.send(output(0))
    assert sender.flush()
    router = OutputReceiver(str(tmp_path / "out.sock"))
    sender.send(output(1))
    router.accept()
    assert router.joined == JOINED
    assert router.next() == output(1)
    router.close()


def test_the_next_router_gets_what_the_dead_one_could_not(
    sender: OutputSender, tmp_path: Path
) -> None:
    """Whole frames, and none of what was left for the one before."""
    path = str(tmp_path / "out.sock")
    first = OutputReceiver(path)
    sender.send(output(0, "x" * 3_000_000))
    first.accept()
    assert first.joined == JOINED
    assert not sender.flush()
    first.close()
    assert is_readable(sender)
    assert sender.flush(), "nobody will read it"
    second = OutputReceiver(path)
    sender.send(output(1))
    second.accept()
    assert second.joined == JOINED
    assert second.next() == output(1)
    second.close()
    # A router that dies while nothing is sent is found out by the next output.
    third = OutputReceiver(path)
    sender.send(output(2))
    third.accept()
    assert third.joined == JOINED
    assert third.next() == output(2)
    third.close()
