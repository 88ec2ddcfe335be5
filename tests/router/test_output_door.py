"""Where the groups' tokens come in: strangers, and connections that end."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest

from albireo.ipc.framing import FrameEncoder
from albireo.ipc.messages import Joined, Reset, Submit
from albireo.ipc.output_lane import OutputSender
from albireo.ipc.paths import OUTPUT_SOCKET

from .conftest import Neighbourhood
from .fakes import WAIT_S, piece
from .test_groups import first_submit, generate, in_flight, wait_for_states

Start = Callable[..., Neighbourhood]
JOINED = FrameEncoder().encode(Joined("detokenizer", 0, 0, 1))


def path_of(near: Neighbourhood) -> str:
    return f"{near.router.spec.runtime_dir}/{OUTPUT_SOCKET}"


@pytest.mark.parametrize(
    "said",
    [b"\xff" * 64, b"\x03\x00\x00\x00abc", JOINED[:-1], FrameEncoder().encode(Reset())],
    ids=["endless", "no msgpack", "half a frame", "another message"],
)
def test_a_stranger_harms_nobody(start: Start, said: bytes) -> None:
    near = start()
    group, client = near.group(), near.client()
    wait_for_states(client, "ready")
    generate(client, 1)
    request = group.expect(Submit).request
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(WAIT_S)
        stranger.connect(path_of(near))
        stranger.sendall(said)
        if said != JOINED[:-1]:
            assert stranger.recv(1) == b""
    group.output(piece(request, 0, [11], "a", "length"))
    assert client.receive()["items"][0][:4] == [1, 0, [11], "a"]


def test_a_connection_that_ends_has_the_group_begin_anew(start: Start) -> None:
    """Tokens may be lost with it; the group itself is alive, and nobody is to blame."""
    near = start(max_failovers=0)
    group, client = near.group(), near.client()
    wait_for_states(client, "ready")
    generate(client, 1)
    first = group.expect(Submit)
    group.output(piece(first.request, 0, [11], "a"))
    assert client.receive()["items"][0][3] == "a"
    group.outputs.close()
    while not isinstance(group.next(), Reset):
        pass
    group.outputs = OutputSender(path_of(near), group.joined)
    group.join()
    again = first_submit(group)
    assert (again.prompt_ids, again.resumed) == ([5, 11], 1)
    group.output(piece(first.request, 1, [13], "of the past"))
    group.output(piece(again.request, 1, [12], "b", "stop"))
    assert client.receive()["items"][0][:4] == [1, 1, [12], "b"]


def test_a_group_may_connect_again(start: Start) -> None:
    near = start()
    group, client = near.group(), near.client()
    wait_for_states(client, "ready")
    generate(client, 1)
    request = group.expect(Submit).request
    old = group.outputs
    group.output(piece(request, 0, [11], "a"))
    assert client.receive()["items"][0][3] == "a"
    group.outputs = OutputSender(path_of(near), group.joined)
    group.output(piece(request, 1, [12], "b"))
    assert client.receive()["items"][0][3] == "b"
    old.close()
    group.output(piece(request, 2, [13], "c", "length"))
    assert client.receive()["items"][0][3] == "c"
    assert in_flight(client)[0][:2] == ("ready", 0)
